"""`/v1/sessions`: for people and programs that look after memories. docs/service.md has every call."""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import parse_qs, unquote_to_bytes

from llamamem.errors import LlamamemError
from llamamem.formats.state import State, decode_state, encode_state
from llamamem.formats.state import math as state_math
from llamamem.gateway import learn
from llamamem.gateway.errors import CHANGED, Refusal, refusal_of
from llamamem.gateway.exchange import Exchange, while_there
from llamamem.gateway.held import Held, HeldSessions
from llamamem.gateway.metrics import Metrics
from llamamem.gateway.naming import session_name
from llamamem.gateway.upstream import Served, Upstream, check_identity
from llamamem.sessions.session import Entry, Generation, Memory, Missing, Session
from llamamem.sessions.store import Record

PREFIX = b"/v1/sessions"
STATE_FILE = "application/octet-stream"

_PAGE, _MOST = 100, 1000
_CallOf = Callable[[Exchange, str, str], Awaitable[None]]


def shown(session: Session) -> dict[str, Any]:
    """What the API tells of a session; no hash of anything that was said."""
    open_ = session.conversation

    def of(generation: Generation) -> dict[str, Any]:
        return generation.model_dump(mode="json", include={"generation", "tokens", "n_bytes", "saved", "state_sha256"})

    fields = {"created", "used", "parent", "sidecar_sha256", "base_sha256"}
    return {
        "object": "session",
        "name": session.name,
        **of(session),
        **session.model_dump(mode="json", include=fields),
        "conversation": None if open_ is None else {"id": open_.id, "exchanges": len(open_.exchanges)},
        "before": None if session.before is None else of(session.before),
    }


class Api:
    def __init__(self, upstream: Upstream, sessions: HeldSessions, metrics: Metrics) -> None:
        self._upstream = upstream
        self._sessions = sessions
        self._metrics = metrics

    async def answer(self, exchange: Exchange, namespace: str) -> None:
        name, action = _parts(exchange.raw_path)
        calls: Mapping[str, _CallOf] = self._calls(action) if name is not None else {"GET": self._list}
        if not calls:  # and what is there may be half a name, which no log shows
            raise Refusal(404, f"sessions have no {action!r}")
        exchange.fields |= {"route": "/v1/sessions" + ("" if name is None else "/NAME") + (action and f"/{action}")}
        call = calls.get(exchange.method)
        if call is None:
            raise Refusal(405, f"this takes {' or '.join(calls)}")
        try:
            await call(exchange, namespace, name or "")
        except LlamamemError as e:
            exchange.fields["why"] = e.reason
            raise refusal_of(e) from None

    def _calls(self, action: str) -> Mapping[str, _CallOf]:
        calls: dict[str, dict[str, _CallOf]] = {
            "": {"GET": self._show, "DELETE": self._delete},
            "memory": {"GET": self._export, "PUT": self._import},
            "fork": {"POST": self._fork},
            "blend": {"POST": self._blend},
            "decay": {"POST": self._decay},
            "learn": {"POST": self._learn},
            "undo": {"POST": self._undo},
        }
        return calls.get(action, {})

    async def _list(self, exchange: Exchange, namespace: str, _: str) -> None:
        asked = parse_qs(exchange.query.decode("latin-1"), encoding="utf-8")
        limit, after = asked.get("limit", [str(_PAGE)])[0], next(iter(asked.get("after", [])), None)
        if not re.fullmatch("[0-9]{1,9}", limit) or not 1 <= int(limit) <= _MOST:
            raise Refusal(400, f"limit: give a number from 1 to {_MOST}")
        store = self._sessions.store.within(namespace)
        found = await self._sessions.run("list", lambda: store.entries(after=after, limit=int(limit) + 1))
        page, more = found[: int(limit)], len(found) > int(limit)
        data = [_damaged(e) if e.session is None or e.fault else shown(e.session) for e in page]
        await exchange.answer_json(
            {"object": "list", "data": data, "has_more": more, "after": page[-1].label if more else None}
        )

    async def _show(self, exchange: Exchange, namespace: str, name: str) -> None:
        await exchange.answer_json(shown((await self._record(namespace, name)).session))

    async def _export(self, exchange: Exchange, namespace: str, name: str) -> None:
        record = await self._record(namespace, name)
        if record.state is None:
            raise Refusal(404, "the session has no memory yet", "session-empty")
        await exchange.answer(200, record.state, STATE_FILE, [(b"content-disposition", b"attachment")])

    async def _import(self, exchange: Exchange, namespace: str, name: str) -> None:
        data, served = await exchange.body(), await self._upstream.served()
        state = decode_state(data, identity=served.identity)
        memory = Memory(data, int(state.tokens_written.max()), *served.identity)
        async with self._sessions.held(namespace, name) as held:
            was_there = held.session is not None
            _check_match(exchange, held.session)
            session = await held.save(memory)
        await self._done(exchange, session, "changed" if was_there else "made", status=200 if was_there else 201)

    async def _delete(self, exchange: Exchange, namespace: str, name: str) -> None:
        store = self._sessions.store.within(namespace)
        try:
            async with self._sessions.held(namespace, name):
                await self._sessions.run("remove", lambda: store.remove(name))
        except Missing:
            raise
        except LlamamemError as e:
            if e.reason in ("session-busy", "store-unreachable"):
                raise
            await self._sessions.run("remove", lambda: store.remove(name))  # a damaged one cannot be read
        try:
            await self._upstream.forget()
        except Refusal as e:
            if e.status < 500:  # of a server that is away nothing is left
                raise
        self._metrics.sessions.labels("removed").inc()
        await exchange.answer_json({"object": "session", "name": name, "deleted": True})

    async def _fork(self, exchange: Exchange, namespace: str, name: str) -> None:
        body = await exchange.json_body()
        to = session_name(_only(body, "to")["to"])
        store = self._sessions.store.within(namespace)
        await self._record(namespace, name)
        async with self._sessions.held(namespace, to) as held:
            if held.session is not None:
                raise Refusal(409, "there is a session of the name `to`; take another, or DELETE it", "session-taken")
            session = await self._sessions.run("create", lambda: store.create(to, name))
        await self._done(exchange, session, "made", status=201)

    async def _blend(self, exchange: Exchange, namespace: str, name: str) -> None:
        body = _only(await exchange.json_body(), "with", "alpha")
        other, alpha = session_name(body["with"]), _number(body["alpha"], "alpha")
        b = (await self._record(namespace, other)).state
        if b is None:
            raise Refusal(400, "the session `with` has no memory yet", "session-empty")
        served = await self._upstream.served()
        mixed = decode_state(b, identity=served.identity)
        await self._change(exchange, namespace, name, lambda a: state_math.blend(a, mixed, alpha))

    async def _decay(self, exchange: Exchange, namespace: str, name: str) -> None:
        factor = _number(_only(await exchange.json_body(), "factor")["factor"], "factor")
        await self._change(exchange, namespace, name, lambda a: state_math.decay(a, factor))

    async def _change(self, exchange: Exchange, namespace: str, name: str, change: Callable[[State], State]) -> None:
        """The same change to the memory and to that which the open conversation began on: it may go on."""
        served = await self._upstream.served()
        async with self._sessions.held(namespace, name) as held:
            record = _with_memory(held, served)

            def changed(data: bytes) -> bytes:
                return encode_state(change(decode_state(data, identity=served.identity)))

            data = changed(record.state or b"")
            origin = None if record.origin is None else changed(record.origin)
            memory = Memory(data, record.session.tokens, *served.identity)
            session = await held.save(memory, record.session.conversation, origin)
        await self._done(exchange, session, "changed")

    async def _undo(self, exchange: Exchange, namespace: str, name: str) -> None:
        store = self._sessions.store.within(namespace)
        async with self._sessions.held(namespace, name) as held:
            if held.session is None:
                raise Missing(name, "")
            if held.session.before is None:
                raise Refusal(409, "there is no generation before this one", "session-first")
            session = await self._sessions.run("undo", lambda: store.undo(name))
        await self._done(exchange, session, "undone")

    async def _learn(self, exchange: Exchange, namespace: str, name: str) -> None:
        body = await exchange.json_body()
        if not await while_there(exchange, self._learnt(exchange, namespace, name, body)):
            exchange.fields["turn"] = "cancelled"

    async def _learnt(self, exchange: Exchange, namespace: str, name: str, body: dict[str, Any]) -> None:
        """An open conversation stays open: what is learnt is read on the memory that it began on, too."""
        streams, served = body.get("stream") is True, await self._upstream.served()
        pieces = await learn.pieces_of(self._upstream, body, served)
        async with self._sessions.held(namespace, name) as held:
            record, was_there = held.record, held.session is not None
            if record is not None:
                check_identity(record.session, served)
            open_ = record.session.conversation if record is not None else None
            origins = [None if record is None else record.state]
            origins += [record.origin] if record is not None and open_ is not None else []
            total, done, memories = sum(map(len, pieces)) * len(origins), 0, []
            if streams:
                await exchange.start(200, [(b"content-type", b"text/event-stream")])
            try:
                for origin in origins:
                    memory = None
                    async for n, after in learn.read(self._upstream, pieces, origin, served):
                        done, memory = done + n, after
                        if streams:
                            progress = json.dumps({"object": "session.progress", "tokens": done, "of": total})
                            await exchange.write(b"data: " + progress.encode() + b"\n\n")
                    memories.append(memory)
                newest = memories[0]
                assert newest is not None
                began = memories[1].data if len(memories) > 1 and memories[1] is not None else None
                session = await held.save(newest, open_, began)
            except (Refusal, LlamamemError) as e:
                if not streams:
                    raise
                await exchange.refuse(e if isinstance(e, Refusal) else refusal_of(e), as_event=True)
                return
        self._metrics.sessions.labels("changed" if was_there else "made").inc()
        if streams:
            await exchange.end(b"data: " + json.dumps(shown(session)).encode() + b"\n\ndata: [DONE]\n\n")
        else:
            await exchange.answer_json(shown(session))

    async def _record(self, namespace: str, name: str) -> Record:
        store = self._sessions.store.within(namespace)
        return await self._sessions.run("read", lambda: store.read(name))

    async def _done(self, exchange: Exchange, session: Session, what: str, *, status: int = 200) -> None:
        self._metrics.sessions.labels(what).inc()
        await exchange.answer_json(shown(session), status)


def _parts(raw: bytes) -> tuple[str | None, str]:
    """Name and action."""
    try:
        parts = [unquote_to_bytes(part).decode() for part in raw[len(PREFIX) :].split(b"/")[1:]]
    except UnicodeDecodeError:
        raise Refusal(400, "the path is not UTF-8") from None
    if not parts or parts == [""]:
        return None, ""
    if len(parts) > 2:
        raise Refusal(400, "the name of the session has a slash in it, or there is too much behind it", "session-name")
    return session_name(parts[0]), parts[1] if len(parts) > 1 else ""


def _check_match(exchange: Exchange, session: Session | None) -> None:
    """`If-Match: "GENERATION"`, 0 for one that is not there: a 409 for another."""
    wanted = [value.decode("latin-1").strip().strip('"') for value in exchange.headers.get("if-match", [])]
    if wanted and wanted != [str(0 if session is None else session.generation)]:
        raise Refusal(409, CHANGED, "session-conflict")


def _damaged(entry: Entry) -> dict[str, Any]:
    return {"object": "session", "name": entry.session and entry.session.name, "fault": "it is damaged"}


def _with_memory(held: Held, served: Served) -> Record:
    record = held.record
    if record is None:
        raise Missing(held.name, "")
    if record.state is None:
        raise Refusal(409, "the session has no memory yet", "session-empty")
    check_identity(record.session, served)
    return record


def _only(body: dict[str, Any], *names: str) -> dict[str, Any]:
    if set(body) != set(names):
        raise Refusal(400, f"give {' and '.join(names)}, and nothing else")
    return body


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise Refusal(400, f"{what}: give a number from 0 to 1")
    return float(value)
