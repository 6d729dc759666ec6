"""The llama-server behind the gateway."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from llamamem.errors import LlamamemError
from llamamem.formats.state import Identity, decode_state, origin_sha256
from llamamem.gateway.errors import Refusal
from llamamem.serving.client import encoded_memory
from llamamem.sessions.session import Memory, Session

# that an answer may take: none. A client that has enough hangs up, and then so do we.
_TIMEOUT = httpx.Timeout(10.0, read=None)
_ADMIN = 60.0  # seconds, for a question of our own


@dataclass(frozen=True)
class Served:
    """What it serves: whose memories it takes, and tokens of context of a slot."""

    identity: Identity
    n_ctx: int
    n_slots: int


class Upstream:
    """`Upstream("http://127.0.0.1:8090", key)`. `url` may change when the server is started again: call `moved`."""

    def __init__(self, url: str, key: str | None = None) -> None:
        self.url = url
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        # A connection each: the server closes one after a stream, and a request that reuses it just then is cut off.
        limits = httpx.Limits(max_keepalive_connections=0, max_connections=None)
        self._http = httpx.AsyncClient(
            headers=headers, timeout=_TIMEOUT, trust_env=False, limits=limits, follow_redirects=False
        )
        self._http.headers.pop("accept-encoding", None)
        self._served: Served | None = None
        self.forgotten = 0  # times

    def moved(self, url: str) -> None:
        """Another process may serve other files."""
        self.url, self._served = url, None

    async def close(self) -> None:
        await self._http.aclose()

    @asynccontextmanager
    async def open(
        self, method: str, path: str, *, query: str = "", content: bytes | None = None, headers: list[tuple[str, str]]
    ) -> AsyncIterator[httpx.Response]:
        """A request of a client, as soon as the head of its answer is there; it ends with the block. Raises Refusal
        when nobody answers."""
        url = self.url + path + (f"?{query}" if query else "")
        request = self._http.build_request(method, url, content=content, headers=headers)
        try:
            response = await self._http.send(request, stream=True)
        except httpx.ConnectError:
            self._served = None
            raise Refusal(
                503, "the server is not ready; it is started or loads: ask again", "server-starting"
            ) from None
        except httpx.TransportError:
            self._served = None
            raise gone() from None
        try:
            yield response
        finally:
            await response.aclose()

    async def ask(self, method: str, path: str, body: Any = None) -> Any:
        """A question of our own: the JSON of its answer. Raises Refusal with what the server says."""
        content = None if body is None else json.dumps(body).encode()
        headers = [("content-type", "application/json")]
        async with self.open(method, path, content=content, headers=headers) as response:
            try:
                data = await response.aread()
            except httpx.TransportError:
                self._served = None
                raise gone() from None
            try:
                answer = json.loads(data) if data else None
            except ValueError:
                answer = None
            if not response.is_success:
                raise Refusal(response.status_code, _reason(answer) or "the server refuses it")
            return answer

    async def text(self, path: str) -> bytes:
        """What it answers to a GET, empty where it refuses."""
        async with self.open("GET", path, headers=[]) as response:
            data = await response.aread()
            return data if response.is_success else b""

    async def is_ready(self) -> bool:
        try:
            async with self.open("GET", "/health", headers=[]) as response:
                return response.status_code == 200
        except Refusal:
            return False

    async def served(self) -> Served:
        if self._served is None:
            props = await self.ask("GET", "/props")
            try:
                memory = props.get("memory_adapter") or props.get("rwkv_ms")
                n_ctx, n_slots = props["default_generation_settings"]["n_ctx"], props["total_slots"]
                if memory is not None:
                    identity = Identity(memory["sidecar_sha256"], memory["base_sha256"])
            except (KeyError, TypeError, AttributeError):
                raise Refusal(502, "the server is of another build; `llamamem build`, then start it again") from None
            if memory is None:
                raise Refusal(400, "this server has no memory: it was started without a sidecar", "no-memory")
            self._served = Served(identity, int(n_ctx), int(n_slots))
        return self._served

    async def forget(self) -> None:
        """No text that was read stays in its caches, but for what it is reading now."""
        self.forgotten += 1
        served = await self.served()
        for slot in range(served.n_slots):
            await self.ask("POST", f"/slots/{slot}?action=forget", {})


def gone() -> Refusal:
    return Refusal(502, "the server went away in the middle of it; the session is as it was before", "server-gone")


def check_identity(session: Session, served: Served) -> None:
    """Raises Refusal when the memory of the session is of other files."""
    if session.state_sha256 is None or (session.sidecar_sha256, session.base_sha256) == served.identity:
        return
    raise Refusal(
        409,
        f"[state-identity] the session is of sidecar {session.sidecar_sha256} and base {session.base_sha256}, this"
        f" server has sidecar {served.identity.sidecar_sha256} and base {served.identity.base_sha256}",
        "state-identity",
    )


def memory_of(told: dict[str, Any] | None, origin: bytes | None, served: Served) -> Memory:
    """The memory after an answer, which must be whole and have begun on `origin`. Raises Refusal."""
    try:
        data = base64.b64decode((told or {})["memory"], validate=True)
        state = decode_state(data, identity=served.identity)
    except (KeyError, TypeError, ValueError, LlamamemError):
        raise Refusal(502, "the server's answer brings no memory that can be kept; nothing was saved") from None
    if (told or {}).get("origin") != (None if origin is None else origin_sha256(origin)):
        raise Refusal(502, "the server answered on another memory than it was given; nothing was saved")
    return Memory(data, int(state.tokens_written.max()), *served.identity)


def carried(origin: bytes | None, extras: dict[str, Any], *, frozen: bool) -> dict[str, Any]:
    """`rwkv_ms` of a request that brings its memory along."""
    setting = {"frozen": True} if frozen else {}
    return {**extras, **setting, "memory": encoded_memory(origin), "return_memory": not frozen}


def _reason(answer: Any) -> str | None:
    try:
        return str(answer["error"]["message"])
    except (KeyError, TypeError):
        return None
