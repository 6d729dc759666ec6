"""Who asks: keys and their namespaces, and what a web page of somebody else's may not do."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from llamamem.errors import LlamamemError
from llamamem.gateway.errors import Refusal
from llamamem.sessions.session import now
from llamamem.sessions.store import Key

_KEY = re.compile(r"llamamem_([0-9a-f]{16})_([A-Za-z0-9_-]{43})")
_BEARER = re.compile(r"\s*bearer(\s+|$)", re.IGNORECASE)
_NAMESPACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LOOPBACK = re.compile(r"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d{1,5})?", re.IGNORECASE)
_NOBODY = "0" * 64


@dataclass(frozen=True)
class Caller:
    """`key` is the id of a key, for logs; None: no keys are asked for."""

    namespace: str
    operator: bool
    key: str | None = None


ANYBODY = Caller("", True)


def new_key(namespace: str | None = None, *, label: str = "", operator: bool = False) -> tuple[str, Key]:
    """A key, which is told once, and what is kept of it. Without a namespace it has one of its own."""
    if namespace and not _NAMESPACE.fullmatch(namespace):
        raise LlamamemError(f"--namespace {namespace!r}: give up to 64 letters, digits, dots, dashes and underscores")
    if len(label) > 200 or (label and not label.isprintable()):
        raise LlamamemError("--label: give up to 200 characters that can be printed")
    id, secret = secrets.token_hex(8), secrets.token_urlsafe(32)
    key = Key(
        id=id,
        sha256=_sha256(secret),
        namespace=id if namespace is None else namespace,
        label=label,
        operator=operator,
        created=now(),
    )
    return f"llamamem_{id}_{secret}", key


class Access:
    """The keys of the store, as they were when it was asked last. `needed`: also while there are none."""

    def __init__(self, keys: Iterable[Key], *, needed: bool = False, origins: Iterable[str] = ()) -> None:
        self.origins = frozenset(origin.rstrip("/") for origin in origins)
        self._needed = needed
        self.update(keys)

    def update(self, keys: Iterable[Key]) -> None:
        self._keys = {key.id: key for key in keys}
        self._needed = self._needed or bool(self._keys)  # never open again once there was one

    def caller(self, headers: Mapping[str, list[bytes]]) -> Caller:
        """Raises Refusal (401) without a key that is known."""
        if not self._needed:
            return ANYBODY
        given = [*headers.get("authorization", []), *headers.get("x-api-key", [])]
        keys = [_BEARER.sub("", value.decode("latin-1")).strip() for value in given]
        match = _KEY.fullmatch(next(filter(None, keys), ""))
        id, secret = (match[1], match[2]) if match else ("", "")
        key = self._keys.get(id)
        # hashes are compared in constant time; one is compared for a key that is not there, too
        same = hmac.compare_digest(_sha256(secret), key.sha256 if key else _NOBODY)
        if key is None or not same:
            raise Refusal(401, "this needs a key of this gateway, as `Authorization: Bearer KEY`", "key")
        return Caller(key.namespace, key.operator, key.id)

    def check_page(self, headers: Mapping[str, list[bytes]]) -> str | None:
        """Raises Refusal for a request of a web page that may not. Returns the origin that may read the answer."""
        host = (headers.get("host") or [b""])[0].decode("latin-1")
        # a name of somebody else's that leads to this machine, for a page that has no key to show
        if not self._needed and not _LOOPBACK.fullmatch(host):
            raise Refusal(403, "without keys this gateway answers to localhost alone", "host")
        origin = (headers.get("origin") or [b""])[0].decode("latin-1").rstrip("/")
        if origin and origin in self.origins:
            return origin
        # a page of this gateway's own has its origin
        if origin and origin.partition("://")[2] != host:
            raise Refusal(403, "pages of other sites may not ask; --cors-origin names those that may", "origin")
        return None


def is_loopback(host: str) -> bool:
    return bool(_LOOPBACK.fullmatch(f"[{host}]" if ":" in host else host))


def _sha256(secret: str) -> str:
    return hashlib.sha256(secret.encode("latin-1", "replace")).hexdigest()
