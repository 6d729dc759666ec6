"""A connection of a client that may not keep it for ever: uvicorn's own, with bounds on slow and endless requests."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_SECONDS = 10.0  # for the head of a request, from the first byte, or from the connection
BODY_SECONDS = 120.0  # for its body
STALL_SECONDS = 60.0  # for a client that takes nothing of an answer
HEAD_BYTES = 64 << 10


class Connection(HttpToolsProtocol):
    """Closed when it takes longer; whoever is slow on purpose gets nothing, and holds nobody up."""

    _timer: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None
    _head_bytes: int | None = 0  # None: no head is being read

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._bound(HEAD_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        self._bound(None)
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._head_bytes is not None:
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_BYTES + self._in_body(data):
                self.transport.abort()
                return
        super().data_received(data)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_bytes = self._head_bytes or 0
        self._bound(HEAD_SECONDS)

    def on_headers_complete(self) -> None:
        self._head_bytes = None
        self._bound(BODY_SECONDS)
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._head_bytes = 0
        self._bound(None)
        super().on_message_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stalled is None:
            self._stalled = self.loop.call_later(STALL_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None
        super().resume_writing()

    def _bound(self, seconds: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if seconds is None else self.loop.call_later(seconds, self.transport.close)

    @staticmethod
    def _in_body(data: bytes) -> int:
        """Bytes of a piece that come after the head in it."""
        end = data.find(b"\r\n\r\n")
        return 0 if end < 0 else len(data) - end
