"""A request to the server on a connection of its own, over asyncio and the parser that uvicorn has too.

Each piece of an answer passes through here: a general client costs more a token than the rest of the gateway together
(`tools/bench_gateway.py`), and what is needed of one is little: no reuse, no redirects, no compression, no TLS.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable
from urllib.parse import urlsplit

import httptools

_HIGH = 256 << 10  # bytes of an answer that wait here; past that the server waits
_CONNECT = 10.0  # seconds


class Broken(Exception):
    """The answer ended before its end, or is none."""


class Response(asyncio.Protocol):
    """An answer: `status` and `headers` once `ask` returned it, then its body, once."""

    def __init__(self, request: bytes) -> None:
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self._request = request
        self._parser = httptools.HttpResponseParser(self)
        self._pieces: deque[bytes] = deque()
        self._waiting = 0  # bytes
        self._wake: asyncio.Future[None] | None = None
        self._has_head = self._whole = self._lost = False
        self._transport: asyncio.Transport | None = None

    @property
    def content_type(self) -> str:
        return next((value.decode("latin-1") for name, value in self.headers if name == b"content-type"), "")

    async def head(self) -> None:
        while not self._has_head:
            await self._next()

    async def pieces(self) -> AsyncIterator[bytes]:
        """As they come. Raises Broken."""
        while True:
            while self._pieces:
                piece = self._pieces.popleft()
                self._waiting -= len(piece)
                if self._waiting <= _HIGH and self._transport is not None and not self._lost:
                    self._transport.resume_reading()
                yield piece
            if self._whole:
                return
            await self._next()

    async def read(self) -> bytes:
        return b"".join([piece async for piece in self.pieces()])

    def close(self) -> None:
        """Hangs up: the server ends what it is at."""
        if self._transport is not None:
            self._transport.abort()

    async def _next(self) -> None:
        if self._lost and not self._whole:
            raise Broken
        self._wake = asyncio.get_running_loop().create_future()
        try:
            await self._wake
        finally:
            self._wake = None

    def _woken(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    # of the connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.close()
        self._woken()

    def connection_lost(self, exc: Exception | None) -> None:
        framed = {b"content-length", b"transfer-encoding"} & {name for name, _ in self.headers}
        self._whole = self._whole or (self._has_head and not framed and exc is None)  # it ends with the connection
        self._lost = True
        self._woken()

    # of the parser

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()
        if self.status >= 200:
            self._has_head = True
        else:  # 100 Continue, of which nobody asked
            self.headers.clear()

    def on_body(self, body: bytes) -> None:
        self._pieces.append(body)
        self._waiting += len(body)
        if self._waiting > _HIGH and self._transport is not None:
            self._transport.pause_reading()

    def on_message_complete(self) -> None:
        self._whole = self._has_head


async def ask(
    method: str, url: str, *, headers: Iterable[tuple[str, str]] = (), content: bytes | None = None
) -> Response:
    """The answer, as soon as its head is there. Raises ConnectionError when nobody listens, Broken."""
    parts = urlsplit(url)
    target = parts.path + (f"?{parts.query}" if parts.query else "")
    lines = [f"{method} {target} HTTP/1.1", f"Host: {parts.netloc}", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in headers]
    if content is not None or method in ("POST", "PUT"):
        lines.append(f"Content-Length: {len(content or b'')}")
    head = "\r\n".join(lines)
    if head.count("\n") != len(lines) - 1 or "\0" in head or " " in target:
        raise ValueError("a header or a path with an end of line in it")
    request = head.encode("latin-1") + b"\r\n\r\n" + (content or b"")
    loop = asyncio.get_running_loop()
    try:
        connected = loop.create_connection(lambda: Response(request), parts.hostname or "", parts.port or 80)
        _, response = await asyncio.wait_for(connected, _CONNECT)
    except asyncio.TimeoutError:
        raise ConnectionError from None
    except OSError as e:
        raise ConnectionError from e
    try:
        await response.head()
    except BaseException:
        response.close()
        raise
    return response
