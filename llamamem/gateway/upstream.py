"""The llama-server behind the gateway."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from llamamem.errors import LlamamemError
from llamamem.formats.state import Identity, decode_state, origin_sha256
from llamamem.gateway import wire
from llamamem.gateway.errors import Refusal
from llamamem.serving.client import encoded_memory
from llamamem.sessions.session import Memory, Session


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
        self.forgotten = 0  # times
        self._key = [("Authorization", f"Bearer {key}")] if key else []
        self._served: Served | None = None
        self._pace = wire.Pace()

    def moved(self, url: str) -> None:
        """Another process may serve other files."""
        self.url, self._served = url, None

    @asynccontextmanager
    async def open(
        self, method: str, path: str, *, query: str = "", content: bytes | None = None, headers: list[tuple[str, str]]
    ) -> AsyncIterator[wire.Response]:
        """A request of a client, as soon as the head of its answer is there; it ends with the block. Raises Refusal
        when nobody answers."""
        url = self.url + path + (f"?{query}" if query else "")
        try:
            response = await wire.ask(method, url, headers=[*self._key, *headers], content=content, pace=self._pace)
        except ConnectionError:
            self._served = None
            raise Refusal(
                503, "the server is started or loads, and is not ready: ask again", "server-starting"
            ) from None
        except wire.Broken:
            self._served = None
            raise gone() from None
        try:
            yield response
        finally:
            response.close()

    async def ask(self, method: str, path: str, body: Any = None) -> Any:
        """A question of our own: the JSON of its answer. Raises Refusal with what the server says."""
        content = None if body is None else json.dumps(body).encode()
        headers = [("Content-Type", "application/json")]
        async with self.open(method, path, content=content, headers=headers) as response:
            try:
                data = await response.read()
            except wire.Broken:
                self._served = None
                raise gone() from None
            try:
                answer = json.loads(data) if data else None
            except ValueError:
                answer = None
            if response.status != 200:
                raise Refusal(response.status, _reason(answer) or "the server refuses it")
            return answer

    async def text(self, path: str) -> bytes:
        """What it answers to a GET, empty where it refuses."""
        async with self.open("GET", path, headers=[]) as response:
            try:
                return await response.read() if response.status == 200 else b""
            except wire.Broken:
                raise gone() from None

    async def is_ready(self) -> bool:
        try:
            async with self.open("GET", "/health", headers=[]) as response:
                return response.status == 200
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
