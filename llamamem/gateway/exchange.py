"""One request and its answer, over ASGI."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Awaitable, Callable, Coroutine, Iterable, MutableMapping
from typing import Any

from llamamem.gateway.errors import Refusal

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
HeaderList = Iterable[tuple[bytes, bytes]]


class ClientGone(Exception):
    """The client hung up before its request was whole."""


class Exchange:
    """`fields` are for the one line that the log has of it. An answer is started once, then written and ended."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, *, max_body: int) -> None:
        self.method: str = scope["method"]
        self.raw_path: bytes = scope.get("raw_path") or scope["path"].encode()
        self.query: bytes = scope.get("query_string", b"")
        self.headers: dict[str, list[bytes]] = {}
        for name, value in scope["headers"]:
            self.headers.setdefault(name.decode("latin-1"), []).append(value)
        self.status = 0  # of the answer, once it is started
        self.ended = False
        self.added: list[tuple[bytes, bytes]] = []  # headers of every answer to this request
        self.fields: dict[str, Any] = {}
        self._receive = receive
        self._send = send
        self._max_body = max_body

    async def body(self) -> bytes:
        length = (self.headers.get("content-length") or [b"0"])[0]
        if not length.isdigit() or int(length) > self._max_body:
            raise self._too_large()
        parts, size = [], 0
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            part = message.get("body", b"")
            size += len(part)
            if size > self._max_body:
                raise self._too_large()
            parts.append(part)
            if not message.get("more_body", False):
                return b"".join(parts)

    async def json_body(self) -> dict[str, Any]:
        """The object in the body; Refusal for anything else."""
        data = await self.body()
        try:
            value = json.loads(data.decode("utf-8-sig"), parse_float=_finite, parse_constant=_finite)
            if b"\\u" in data:
                json.dumps(value, ensure_ascii=False).encode()  # fails for half a pair of surrogates, which is no text
        except (ValueError, RecursionError):  # the reason would have a piece of the text in it
            raise Refusal(400, "the body is not JSON") from None
        if not isinstance(value, dict):
            raise Refusal(400, "the body is not a JSON object")
        return value

    async def gone(self) -> None:
        """Returns when the client has hung up; never once all was answered."""
        while (await self._receive())["type"] != "http.disconnect":
            pass
        if self.ended:
            await asyncio.Event().wait()

    async def start(self, status: int, headers: HeaderList) -> None:
        self.status = status
        await self._send({"type": "http.response.start", "status": status, "headers": [*headers, *self.added]})

    async def write(self, data: bytes) -> None:
        """Waits while the client takes no more."""
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self, data: bytes = b"") -> None:
        self.ended = True
        await self._send({"type": "http.response.body", "body": data, "more_body": False})

    async def answer(
        self, status: int, data: bytes, kind: str = "application/json; charset=utf-8", headers: HeaderList = ()
    ) -> None:
        """All of it at once."""
        length = str(len(data)).encode()
        await self.start(status, [(b"content-type", kind.encode()), (b"content-length", length), *headers])
        await self.end(data)

    async def answer_json(self, value: Any, status: int = 200) -> None:
        await self.answer(status, json.dumps(value).encode())

    async def refuse(self, refusal: Refusal, *, as_event: bool = False) -> None:
        """As the whole answer; of one that is under way, as the last event of its stream."""
        if not self.status:
            # what is left of the request is not read
            await self.answer(refusal.status, refusal.body(), headers=[*refusal.headers, (b"connection", b"close")])
        elif as_event:
            await self.end(b"event: error\ndata: " + refusal.body() + b"\n\n")

    def _too_large(self) -> Refusal:
        return Refusal(413, f"the body has more than the {self._max_body} bytes that are allowed")


def _finite(text: str) -> float:
    """Of a number, or of what Python takes for one and JSON does not know."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


async def while_there(exchange: Exchange, work: Coroutine[Any, Any, None]) -> bool:
    """Does the work unless the client hangs up; False when it did."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(exchange.gone())
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait((task,))
    if task.cancelled():
        return False
    task.result()
    return True
