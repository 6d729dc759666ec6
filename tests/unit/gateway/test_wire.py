"""How pieces of an answer are passed on: all of them, in order, several at a time where many answers come at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from llamamem.gateway import wire

HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


async def passed_on(answers: int, events: int, end: Callable[[wire.Response], None]) -> list[bytes]:
    """The pieces of an answer that comes event by event, beside so many others."""
    pace = wire.Pace()
    pace.answers = answers
    response = wire.Response(b"", pace)
    response.data_received(HEAD)
    found: list[bytes] = []

    async def read() -> None:
        async for piece in response.pieces():
            found.append(piece)

    reading = asyncio.ensure_future(read())
    for i in range(events):
        response.data_received(chunk(b"%d " % i))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    end(response)
    await asyncio.wait_for(reading, 10)
    assert pace.answers == answers
    return found


def whole(response: wire.Response) -> None:
    response.data_received(chunk(b"end") + b"0\r\n\r\n")


def test_the_first_pieces_are_passed_on_at_once_and_the_end_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "_LONGEST", 60.0)
    monkeypatch.setattr(wire, "_PIECES", 0.01)
    found = asyncio.run(passed_on(64, 200, whole))
    assert b"".join(found) == b"".join(b"%d " % i for i in range(200)) + b"end"
    assert found[:4] == [b"0 ", b"1 ", b"2 ", b"3 "] and len(found) == 5


def test_a_slow_answer_is_passed_on_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "_PIECES", 1e9)
    found = asyncio.run(passed_on(0, 50, whole))
    assert len(found) > 25 and b"".join(found).endswith(b"49 end")


def test_an_answer_that_breaks_off_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "_LONGEST", 60.0)
    monkeypatch.setattr(wire, "_PIECES", 0.01)
    with pytest.raises(wire.Broken):
        asyncio.run(passed_on(64, 20, lambda response: response.connection_lost(None)))
