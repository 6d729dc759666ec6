"""A turn: a request that generates on the memory of a session, and the memory after it, saved before the client is told
that it is over.

A turn that fails, is cancelled or loses its server leaves the session as it was before. What decides is the save: it is
done when the whole answer has come from the server, and before the last event of the answer is passed on.
"""

from __future__ import annotations

import json
import time
from typing import Any

from llamamem.errors import LlamamemError
from llamamem.gateway import wire
from llamamem.gateway.errors import CHANGED, Refusal, refusal_of
from llamamem.gateway.exchange import Exchange, while_there
from llamamem.gateway.held import Held, HeldSessions
from llamamem.gateway.metrics import Metrics
from llamamem.gateway.naming import Named
from llamamem.gateway.routes import ENDS, TOLD, Kind, Listener, answer, asked, events_of, told_in
from llamamem.gateway.turns import Answer, Asked, after, goes_on
from llamamem.gateway.upstream import Served, Upstream, carried, check_identity, gone, memory_of
from llamamem.sessions.session import Conflict, Missing
from llamamem.sessions.store import Record

_PASSED = ("content-type", "accept", "user-agent")
# of an answer, what is a matter of its connection, or of who may read it
_KEPT_BACK = {b"connection", b"keep-alive", b"transfer-encoding", b"content-length", b"server", b"date", b"vary"}
_EVENTS = "text/event-stream"


def passed_headers(exchange: Exchange) -> list[tuple[str, str]]:
    """Those of a request that the server gets: no keys, no names of sessions."""
    there = [name for name in _PASSED if name in exchange.headers]
    # the server takes no tab
    found = [(name, exchange.headers[name][0].decode("latin-1").replace("\t", " ")) for name in there]
    return found if "content-type" in exchange.headers else [*found, ("content-type", "application/json")]


def answered_headers(response: wire.Response) -> list[tuple[bytes, bytes]]:
    return [
        (name, value)
        for name, value in response.headers
        if name not in _KEPT_BACK and not name.startswith(b"access-control-")
    ]


async def relay(exchange: Exchange, response: wire.Response) -> None:
    """An answer as it is, piece by piece, no faster than the client takes it."""
    await exchange.start(response.status, answered_headers(response))
    try:
        async for piece in response.pieces():
            await exchange.write(piece)
    except wire.Broken:
        if response.content_type.startswith(_EVENTS):
            await exchange.refuse(gone(), as_event=True)
            return
        raise gone() from None
    await exchange.end()


class Turns:
    """Of one gateway. `take` answers a request that names a session; errors after its head are its last event."""

    def __init__(self, upstream: Upstream, sessions: HeldSessions, metrics: Metrics) -> None:
        self._upstream = upstream
        self._sessions = sessions
        self._metrics = metrics

    async def take(
        self, exchange: Exchange, kind: Kind, path: str, namespace: str, body: dict[str, Any], named: Named
    ) -> None:
        turn = _Turn(self._upstream, self._metrics, exchange, kind, path, body, named)
        outcome, began = "failed", time.monotonic()
        try:
            if named.mode == "read":
                there = await while_there(exchange, self._read(turn, namespace))
            else:
                there = await while_there(exchange, self._write(turn, namespace))
            outcome = turn.outcome if there or turn.outcome == "done" else "cancelled"
        except Refusal as e:
            outcome = "refused" if e.status < 500 else "failed"
            if not exchange.status:
                raise
            exchange.fields["error"] = e.code or e.status
            await exchange.refuse(e, as_event=True)
        finally:
            self._metrics.turns.labels(outcome).inc()
            self._metrics.turn_seconds.observe(time.monotonic() - began)
            exchange.fields["turn"] = outcome

    async def _write(self, turn: _Turn, namespace: str) -> None:
        try:
            async with self._sessions.held(namespace, str(turn.named.session)) as held:
                await turn.write(held)
        except (Conflict, Missing) as e:  # removed and lost are the same to who was in the middle of it
            self._metrics.conflicts.labels("generation").inc()
            raise Refusal(409, CHANGED, "session-conflict") from e
        except LlamamemError as e:
            turn.exchange.fields["why"] = e.reason
            raise refusal_of(e) from None

    async def _read(self, turn: _Turn, namespace: str) -> None:
        store = self._sessions.store.within(namespace)
        try:
            record = await self._sessions.run("read", lambda: store.read(str(turn.named.session)))
        except Missing:
            record = None
        except LlamamemError as e:
            turn.exchange.fields["why"] = e.reason
            raise refusal_of(e) from None
        forgotten = self._upstream.forgotten
        try:
            await turn.read(record)
        finally:
            if self._upstream.forgotten != forgotten:  # its session may have been removed meanwhile
                await self._upstream.forget()


class _Turn:
    def __init__(
        self,
        upstream: Upstream,
        metrics: Metrics,
        exchange: Exchange,
        kind: Kind,
        path: str,
        body: dict[str, Any],
        named: Named,
    ) -> None:
        self.exchange = exchange
        self.named = named
        self.outcome = "failed"
        self._upstream, self._metrics = upstream, metrics
        self._kind, self._path, self._body = kind, path, body
        self._asked = Asked()
        self._went_on = False
        self._began = time.monotonic()

    async def write(self, held: Held) -> None:
        served = await self._upstream.served()
        origin = self._origin(held.record, served)
        async with self._opened(origin, frozen=False) as response:
            if response.status != 200:
                self.outcome = "refused"
                await relay(self.exchange, response)
            elif response.content_type.startswith(_EVENTS):
                await self._stream(response, held, origin, served)
            else:
                await self._whole(response, held, origin, served)

    async def read(self, record: Record | None) -> None:
        origin = self._origin(record, await self._upstream.served())
        async with self._opened(origin, frozen=True) as response:
            self.outcome = "read" if response.status == 200 else "refused"
            await relay(self.exchange, response)

    def _origin(self, record: Record | None, served: Served) -> bytes | None:
        """The memory that the request runs on."""
        self._asked = asked(self._kind, self._body)
        if record is None:
            return None
        check_identity(record.session, served)
        self._went_on = goes_on(record.session.conversation, self.named.conversation, self._asked)
        return record.origin if self._went_on else record.state

    def _opened(self, origin: bytes | None, *, frozen: bool) -> Any:
        body = {**self._body, self.named.spelling: carried(origin, self.named.extras, frozen=frozen)}
        content = json.dumps(body).encode()
        return self._upstream.open("POST", self._path, content=content, headers=passed_headers(self.exchange))

    async def _whole(self, response: wire.Response, held: Held, origin: bytes | None, served: Served) -> None:
        try:
            data = json.loads(await response.read())
        except (wire.Broken, ValueError):
            raise gone() from None
        told = told_in(data)
        await self._settle(held, told, answer(self._kind, data), origin, served)
        await self.exchange.answer_json(data)

    async def _stream(self, response: wire.Response, held: Held, origin: bytes | None, served: Served) -> None:
        """Passes events on as they come, up to those of the end; these wait until the memory is saved."""
        listener, rest, tail = Listener(self._kind), b"", b""
        await self.exchange.start(200, answered_headers(response))
        self._metrics.first_seconds.observe(time.monotonic() - self._began)
        try:
            async for piece in response.pieces():
                rest += piece
                cut = rest.rfind(b"\n\n") + 2
                if cut < 2:
                    continue
                events, rest = rest[:cut], rest[cut:]
                at = 0 if tail else self._end_in(events)
                if now := events[:at]:
                    await self.exchange.write(now)
                tail += events[at:]
                for event in events_of(events):
                    listener.hear(event)
        except wire.Broken:
            raise gone() from None
        if listener.error:  # the server said so itself
            await self.exchange.end(tail + rest)
            return
        if listener.last is None:
            raise gone()
        await self._settle(held, listener.last, listener.answer(), origin, served)
        await self.exchange.end(_retold(tail + rest, listener.last))

    def _end_in(self, events: bytes) -> int:
        """Where the events of the answer's end begin."""
        found = [at for mark in ENDS[self._kind] if (at := events.find(mark)) >= 0]
        if not found:
            return len(events)
        before = events.rfind(b"\n\n", 0, min(found))
        return before + 2 if before >= 0 else 0

    async def _settle(
        self, held: Held, told: dict[str, Any] | None, said: Answer, origin: bytes | None, served: Served
    ) -> None:
        """Saves the memory after the answer, and puts into `told` what the client is to know."""
        memory = memory_of(told, origin, served)
        assert told is not None
        open_ = held.session.conversation if held.session else None
        conversation = after(open_, self._went_on, self.named.conversation, self._asked, said)
        session = await held.save(memory, conversation, origin)
        self.outcome = "done"
        if not self.named.extras.get("return_memory"):
            del told["memory"]
        kind, reused = "goes on" if self._went_on else "new", int(told.get("reused") or 0)
        told |= {"session": session.name, "conversation": kind, "generation": session.generation}
        self.exchange.fields |= {"conversation": kind, "generation": session.generation, "reused": reused}
        self._metrics.conversations.labels(kind).inc()
        self._metrics.reused_tokens.inc(reused)
        if self._went_on and reused == 0:
            self._metrics.rereads.inc()


def _retold(events: bytes, told: dict[str, Any]) -> bytes:
    """The events of the end, with `told` as what they tell of the memory."""
    said = (_with(event, told) if any(mark in event for mark in TOLD) else event for event in events.split(b"\n\n"))
    return b"\n\n".join(said)


def _with(event: bytes, told: dict[str, Any]) -> bytes:
    head, _, data = event.rpartition(b"data:")
    value = json.loads(data)
    if (place := told_in(value)) is not None:
        place.clear()
        place.update(told)
    return head + b"data: " + json.dumps(value).encode()
