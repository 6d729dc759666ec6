"""Sessions of a gateway, over its API: what `llamamem session` and `chat` need where only a URL and a key are known."""

from __future__ import annotations

from datetime import timedelta
from typing import Any
from urllib.parse import quote

import httpx

from llamamem.errors import LlamamemError
from llamamem.serving.client import Client
from llamamem.sessions.session import Entry, Memory, Missing, Session, check_name, now, taken
from llamamem.sessions.store import Busy, Full, Unreachable

_PAGE = 200
_GENERATION = {"generation", "tokens", "n_bytes", "saved", "state_sha256", "sidecar_sha256", "base_sha256"}


class GatewaySessions:
    """`GatewaySessions(client)`: those of the namespace that the client's key opens.

    Of a store it has what the command line uses. A session with nothing saved cannot be made there: `create` gives one,
    and its first save makes it. Methods raise LlamamemError.
    """

    def __init__(self, client: Client) -> None:
        self._client = client

    @property
    def location(self) -> str:
        return str(self._client.url).rstrip("/")

    def create(self, name: str, from_: str | None = None) -> Session:
        if self._found(check_name(name)) is not None:
            raise taken(name, self.location)
        if from_ is not None:
            answer = self._ask("POST", from_, "fork", json={"to": name})
            return _session(answer)
        time = now()
        return Session(name=name, created=time, used=time)

    def load(self, name: str) -> tuple[Session, bytes | None]:
        found = self._found(check_name(name))
        if found is None:
            raise Missing(name, self.location)
        if found.state_sha256 is None:
            return found, None
        return found, self._request("GET", name, "memory").content

    def save(self, session: Session, memory: Memory) -> Session:
        """Raises LlamamemError when the gateway has another version by now."""
        expected = {"If-Match": f'"{session.generation}"'}
        return _session(self._ask("PUT", session.name, "memory", content=memory.data, headers=expected))

    def undo(self, name: str) -> Session:
        return _session(self._ask("POST", check_name(name), "undo"))

    def entries(self, *, after: str | None = None, limit: int | None = None, verify: bool = False) -> list[Entry]:
        """States are not read, whatever `verify` says: a gateway checks each that it loads."""
        entries: list[Entry] = []
        while limit is None or len(entries) < limit:
            asked: dict[str, Any] = {"limit": _PAGE if limit is None else min(_PAGE, limit - len(entries))}
            page = self._client.request(
                "GET", "/v1/sessions", params=asked | ({} if after is None else {"after": after})
            )
            body = self._checked(page, "GET /v1/sessions")
            entries += [
                Entry(one["name"] or "?", None, one["fault"]) if one.get("fault") else Entry(one["name"], _session(one))
                for one in body["data"]
            ]
            if not body["has_more"]:
                break
            after = body["after"]
        return entries

    def names(self, start: str, limit: int) -> list[str]:
        return [e.label for e in self.entries() if e.label.startswith(start)][:limit]

    def remove(self, name: str) -> None:
        self._ask("DELETE", check_name(name))

    def prune(self, older_than: timedelta) -> list[str]:
        old = [e.label for e in self.entries() if e.session and e.session.used < now() - older_than]
        for name in old:
            self.remove(name)
        return old

    def total_bytes(self) -> int:
        return sum(entry.session.n_bytes for entry in self.entries() if entry.session)

    def _found(self, name: str) -> Session | None:
        response = self._client.request("GET", _path(name))
        if response.status_code == 404:
            return None
        return _session(self._checked(response, "GET /v1/sessions/NAME"))

    def _ask(self, method: str, name: str, action: str = "", **kwargs: Any) -> dict[str, Any]:
        answer: dict[str, Any] = self._request(method, name, action, **kwargs).json()
        return answer

    def _request(self, method: str, name: str, action: str = "", **kwargs: Any) -> httpx.Response:
        response = self._client.request(method, _path(name, action), **kwargs)
        if response.status_code == 404:
            raise Missing(name, self.location)
        if not response.is_success:
            self._checked(response, f"{method} /v1/sessions/NAME/{action}".rstrip("/"))
        return response

    def _checked(self, response: httpx.Response, what: str) -> dict[str, Any]:
        try:
            answer = response.json()
            if response.is_success:
                return dict(answer)
            error = answer["error"]
            message, code = str(error["message"]), str(error.get("code") or "")
        except (ValueError, KeyError, TypeError):
            raise LlamamemError(
                f"{self.location}: {what} answered {response.status_code}, and is no gateway's; `llamamem serve"
                " --sessions STORE` is one"
            ) from None
        if response.status_code == 503:
            raise Unreachable(f"{self.location}: {message}")
        if response.status_code == 507:
            raise Full(f"{self.location}: {message}")
        if code == "session-busy":
            raise Busy(what)
        hint = "; give its key with --api-key" if response.status_code == 401 else ""
        raise LlamamemError(f"{self.location}: {message}{hint}", reason=code or None)


def is_gateway(client: Client) -> bool:
    """Whether a server says that it has sessions."""
    return client.props().get("sessions") is True


def _path(name: str, action: str = "") -> str:
    return f"/v1/sessions/{quote(name, safe='')}" + (f"/{action}" if action else "")


def _session(told: dict[str, Any]) -> Session:
    fields = {name: told.get(name) for name in (*_GENERATION, "name", "created", "used", "parent")}
    before = told.get("before")
    return Session.model_validate(
        fields | {"before": before and {name: before[name] for name in _GENERATION if name in before}}
    )
