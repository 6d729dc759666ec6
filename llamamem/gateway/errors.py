"""What a request is answered when it cannot be done: docs/service.md has the table."""

from __future__ import annotations

import json
from typing import Any

from llamamem.errors import LlamamemError
from llamamem.sessions.session import Conflict, Missing
from llamamem.sessions.store import Busy, Full, Unreachable

RETRY_AFTER = 2  # seconds
CHANGED = "the session was changed or removed by another request meanwhile, and is as that left it: ask again"

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "request_too_large",
    502: "server_error",
    503: "unavailable_error",
    507: "insufficient_storage",
}


class Refusal(Exception):
    """Answered with this status and one line that says why. `code` is for programs."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(" ".join(message.split()))
        self.status = status
        self.code = code

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        if self.status == 503:
            return [(b"retry-after", str(RETRY_AFTER).encode())]
        return [(b"www-authenticate", b"Bearer")] if self.status == 401 else []

    def body(self) -> bytes:
        """In the form of OpenAI's clients and of Anthropic's at once."""
        kind = _TYPES.get(self.status, "server_error")
        error: dict[str, Any] = {"message": str(self), "type": kind, "code": self.code or self.status}
        return json.dumps({"type": "error", "error": error}).encode()


def refusal_of(error: LlamamemError) -> Refusal:
    """What a client is told of it. The place of a store is nobody's business but the operator's."""
    reason = error.reason or ""
    if isinstance(error, Missing):
        return Refusal(404, "there is no such session", "session-missing")
    if isinstance(error, Conflict):
        return Refusal(409, CHANGED, "session-conflict")
    if isinstance(error, Busy):
        return Refusal(409, "another request is at this session, and did not end in time: ask again", "session-busy")
    if isinstance(error, Unreachable):
        return Refusal(503, "the store of sessions does not answer; nothing was changed: ask again", reason)
    if isinstance(error, Full):
        return Refusal(507, "there is no room for more in the store of sessions; nothing was changed", reason)
    if reason == "state-identity":
        return Refusal(409, str(error), reason)
    if reason.startswith("state-"):
        return Refusal(400, str(error), reason)
    return Refusal(
        500, "the session cannot be used; `llamamem session list --verify` says why", reason or "session-damaged"
    )
