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
_PIECES = 500  # a second, of all answers together
_LONGEST = 0.02  # seconds between two pieces of an answer, less than is seen
_AT_ONCE = 4  # pieces of an answer that do not wait: its head and the first of it


class Broken(Exception):
    """The answer ended before its end, or is none."""


class Pace:
    """The more answers come at once, the more of each is passed on at a time: else passing them on takes from the
    server the time in which it makes them. A model with under 500 tokens a second, of one answer, is passed on token by
    token; no answer rests for longer than is seen, and none at its end."""

    def __init__(self) -> None:
        self.answers = 0

    @property
    def seconds(self) -> float:
        """Between two pieces of an answer."""
        return min(self.answers / _PIECES, _LONGEST)


class Response(asyncio.Protocol):
    """An answer: `status` and `headers` once `ask` returned it, then its body, once."""

    def __init__(self, request: bytes, pace: Pace) -> None:
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self._request = request
        self._pace = pace
        self._parser = httptools.HttpResponseParser(self)
        self._pieces: deque[bytes] = deque()
        self._waiting = 0  # bytes
        self._wake: asyncio.Future[None] | None = None
        self._has_head = self._whole = self._lost = self._rests = False
        self._transport: asyncio.Transport | None = None

    @property
    def content_type(self) -> str:
        return next((value.decode("latin-1") for name, value in self.headers if name == b"content-type"), "")

    async def head(self) -> None:
        while not self._has_head:
            await self._next()

    async def pieces(self) -> AsyncIterator[bytes]:
        """As they come, or what came meanwhile. Raises Broken."""
        self._pace.answers += 1
        try:
            n = 0
            while True:
                if self._pieces:
                    piece = b"".join(self._pieces)
                    self._pieces.clear()
                    if self._waiting > _HIGH:
                        self._resume()
                    self._waiting = 0
                    yield piece
                    n += 1
                    if n >= _AT_ONCE and not (self._whole or self._lost) and (seconds := self._pace.seconds):
                        await self._rest(seconds)
                elif self._whole:
                    return
                else:
                    await self._next()
        finally:
            self._pace.answers -= 1

    async def read(self) -> bytes:
        return b"".join([piece async for piece in self.pieces()])

    def close(self) -> None:
        """Hangs up: the server ends what it is at."""
        if self._transport is not None:
            self._transport.abort()

    async def _rest(self, seconds: float) -> None:
        """Until so much time is over, or the answer is."""
        loop = asyncio.get_running_loop()
        self._wake, self._rests = loop.create_future(), True
        timer = loop.call_later(seconds, self._woken)
        try:
            await self._wake
        finally:
            timer.cancel()
            self._wake, self._rests = None, False

    def _resume(self) -> None:
        if self._transport is not None and not self._lost:
            self._transport.resume_reading()

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
        if not self._rests or self._whole:
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
    method: str,
    url: str,
    *,
    headers: Iterable[tuple[str, str]] = (),
    content: bytes | None = None,
    pace: Pace | None = None,
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
    response = Response(request, pace or Pace())
    connected = asyncio.ensure_future(loop.create_connection(lambda: response, parts.hostname or "", parts.port or 80))
    connected.add_done_callback(lambda done: done.cancelled() or done.exception())  # also where nobody waits any more
    try:
        # wait_for of Python 3.11 forgets that it was cancelled when the connection is there in the same moment
        await asyncio.wait((connected,), timeout=_CONNECT)
        if not connected.done():
            raise ConnectionError
        try:
            connected.result()
        except OSError as e:
            raise ConnectionError from e
        await response.head()
        response._whole = response._whole or method == "HEAD"  # which has no body
    except BaseException:
        connected.cancel()
        response.close()
        raise
    return response
