"""The checks in the order of the report, and the run through them."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from llamamem.errors import LlamamemError
from llamamem.formats.health import CHECK_IDS, Check, FileHash, HealthReport
from llamamem.formats.sidecar.inspect import printable
from llamamem.formats.trace import read_trace
from llamamem.proof.health import server, states
from llamamem.proof.health.evidence import Evidence, Fails, is_timeout
from llamamem.proof.health.kept import put_back_after_a_kill, slot_kept
from llamamem.proof.health.log import log
from llamamem.proof.health.slot import Unknown
from llamamem.proof.health.target import Target
from llamamem.serving.client import Client
from llamamem.serving.digests import Progress

_WIDTH = 600  # characters of a detail


@dataclass(frozen=True)
class Row:
    """`run` returns what it found, or raises `Fails` (or anything else: the check does not hold). `hint` is for
    failures that bring none of their own."""

    id: str
    run: Callable[[Evidence], str]
    hint: str


CHECKS = (
    Row("binary", server.binary, "start the server with `llamamem serve`"),
    Row("binding", server.binding, "serve the base that the sidecar is bound to"),
    Row("models", server.models, "is another server at this address?"),
    Row("constraints", server.constraints, "start the server with `llamamem serve`"),
    Row("log", log, "look at the log: `llamamem logs`"),
    Row("props", server.props, "start the server again with `llamamem serve`"),
    Row("chat", server.chat, "look at the log: `llamamem logs`"),
    Row("trace", server.trace, "`llamamem trace compare` shows both texts"),
    Row("slot_roundtrip", states.slot_roundtrip, "look at the log: `llamamem logs`"),
    Row("corrupt_restore", states.corrupt_restore, "do not load states here; start the server with `llamamem serve`"),
    Row("foreign_restore", states.foreign_restore, "do not load states here; start the server with `llamamem serve`"),
    Row("causal", states.causal, "`llamamem parity` compares the numbers"),
)
assert tuple(row.id for row in CHECKS) == CHECK_IDS


def check_health(
    target: Target,
    *,
    api_key: str | None = None,
    timeout: float = 120.0,
    progress: Progress | None = None,
    on_check: Callable[[str], None] | None = None,
) -> HealthReport:
    """Makes every check. `timeout` is that of one request in seconds; `on_check` is told the id of the next check.

    A slot that holds nothing is used, or one that holds afterwards what it held before; files that are made in the slot
    directory are removed.
    Raises LlamamemError when the server cannot be asked at all (it does not answer, still loads, wants another key), or
    the trace cannot be read.
    """
    reference = read_trace(target.trace) if target.trace else None
    with Client(target.url, api_key=api_key, timeout=timeout) as client:
        evidence = Evidence(client, target, reference, progress)
        _reach(evidence)
        timestamp, checks = datetime.now(timezone.utc), []
        with suppress(Fails, LlamamemError, LookupError, TypeError, ValueError, OSError):
            put_back_after_a_kill(evidence)
        with slot_kept(evidence) as lost:
            for row in CHECKS:
                if on_check is not None:
                    on_check(row.id)
                checks.append(_check(row, evidence))
    if lost:  # a state that is not what was saved is what this check is about
        checks = [_lost(check, lost[0]) if check.id == "slot_roundtrip" else check for check in checks]
    return HealthReport(
        ok=all(check.ok for check in checks),
        run_id=target.run_id,
        timestamp=timestamp,
        url=target.url,
        model=str(evidence.props["model_alias"]) if "model_alias" in evidence.props else None,
        base=_file(target.model, lambda: evidence.base_sha256),
        sidecar=_file(target.sidecar, lambda: evidence.identity.sidecar_sha256),
        log=str(target.log) if target.log else None,
        checks=tuple(checks),
    )


def _reach(evidence: Evidence) -> None:
    try:
        evidence.client.health()
        known = isinstance(evidence.props, dict)  # asks for the API key too
    except (ValueError, TypeError):
        known = False
    if not known:
        raise LlamamemError(f"{evidence.target.url}: does not answer as a llama-server does; check --url")


def _check(row: Row, evidence: Evidence) -> Check:
    start = time.perf_counter()

    def made(ok: bool, detail: str, hint: str | None = None) -> Check:
        ms = round((time.perf_counter() - start) * 1000, 1)
        return Check(id=row.id, ok=ok, detail=printable(" ".join(detail.split()), _WIDTH), hint=hint, ms=ms)

    try:
        return made(True, row.run(evidence))
    except Fails as fault:
        return made(False, fault.detail, fault.hint or row.hint)
    except Unknown as error:
        return made(False, str(error), "give --slot-dir")
    except (LlamamemError, OSError) as error:
        if is_timeout(error):
            evidence.hung = evidence.hung or row.id
        return made(False, str(error), row.hint)
    except Exception as error:
        return made(False, f"the answer is not as expected: {type(error).__name__}: {error}", row.hint)


def _lost(check: Check, what: str) -> Check:
    detail = what if check.ok else f"{check.detail}; {what}"
    return check.model_copy(
        update={"ok": False, "detail": detail, "hint": check.hint or "do not use what that slot holds"}
    )


def _file(path: Path | None, sha256: Callable[[], str]) -> FileHash | None:
    if path is None:
        return None
    try:
        return FileHash(path=str(path), sha256=sha256())
    except (Fails, LlamamemError, OSError):
        return FileHash(path=str(path))
