"""What `llamamem serve --sessions` needs before anything is started."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from socket import socket
from typing import Any

from llamamem.cli.session import open_given_store, size_of
from llamamem.errors import LlamamemError
from llamamem.gateway import Settings, listen
from llamamem.gateway.access import is_loopback
from llamamem.gateway.naming import CONVERSATION_HEADERS, SESSION_HEADERS, Headers
from llamamem.serving.foreground import Signals
from llamamem.serving.preflight import Checked
from llamamem.serving.profiles import Plan
from llamamem.sessions import SessionStore

Given = tuple[list[str] | None, list[str] | None, list[str] | None, float, str]

_KEYS = ("--api-key", "--api_key", "--api-key-file", "--api_key_file")


@dataclass(frozen=True)
class Front:
    """The store, and the port that is taken for the gateway; None on a dry run."""

    store: SessionStore
    settings: Settings
    listener: socket | None

    def serve(self, plan: Plan, checked: Checked, signals: Signals, **options: Any) -> int:
        from llamamem.gateway.foreground import serve_sessions

        assert self.listener is not None
        return serve_sessions(plan, checked, signals, self.store, self.settings, self.listener, **options)


def prepare(
    sessions: str,
    quota: str | None,
    sidecar: Path | None,
    host: str,
    port: int,
    extra: list[str],
    given: Given,
    dry_run: bool,
) -> Front:
    """Raises LlamamemError for what would not do, before anything is started."""
    session_headers, conversation_headers, origins, lease, max_body = given
    if sidecar is None:
        raise LlamamemError("--sessions: a base alone has no memory; give --sidecar FILE, or --demo for a small model")
    if owned := [arg for arg in extra if arg.partition("=")[0] in _KEYS]:
        raise LlamamemError(f"{owned[0]}: with --sessions keys are the gateway's; `llamamem key add` makes one")
    store = open_given_store(sessions, quota)
    open_to_all = not is_loopback(host)
    if open_to_all and not store.keys():
        raise LlamamemError(
            f"--host {host}: whoever reaches this machine could read every memory; make a key first, with"
            f" `llamamem key add --store {sessions}`"
        )
    settings = Settings(
        headers=Headers(
            (*_lower(session_headers), *SESSION_HEADERS), (*_lower(conversation_headers), *CONVERSATION_HEADERS)
        ),
        needs_key=open_to_all,
        origins=tuple(origins or ()),
        lease=lease,
        max_body=size_of(max_body, "--max-body"),
    )
    return Front(store, settings, None if dry_run else listen(host, port))


def _lower(names: list[str] | None) -> list[str]:
    for name in names or []:
        if not name.isascii() or not name.replace("-", "").isalnum():
            raise LlamamemError(f"{name!r}: no name of a header; give letters, digits and dashes")
    return [name.lower() for name in names or []]
