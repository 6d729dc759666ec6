"""The gateway as an ASGI application: every route of llama-server, with the memory of a session where one is named."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from dataclasses import dataclass, field
from urllib.parse import quote

from llamamem.errors import LlamamemError
from llamamem.gateway.access import Access, Caller
from llamamem.gateway.api import PREFIX, Api
from llamamem.gateway.errors import Refusal
from llamamem.gateway.exchange import ClientGone, Exchange, Receive, Scope, Send, while_there
from llamamem.gateway.held import HeldSessions
from llamamem.gateway.logs import Log, hashed_name
from llamamem.gateway.metrics import Metrics
from llamamem.gateway.naming import Headers, Path, named, split_path
from llamamem.gateway.openapi import description
from llamamem.gateway.routes import GENERATES, PLAIN, Kind
from llamamem.gateway.turn import Turns, passed_headers, relay
from llamamem.gateway.upstream import Upstream
from llamamem.sessions.store import SessionStore

_LOOK = 2.0  # seconds between looks at the keys and removals of the store
_OPEN = {("GET", "/health"), ("GET", "/v1/health"), ("GET", "/")}  # for whoever asks: they tell nothing


@dataclass(frozen=True)
class Settings:
    """`needs_key`: also while the store has no keys. `origins` are web pages that may ask."""

    headers: Headers = field(default_factory=Headers)
    needs_key: bool = False
    origins: tuple[str, ...] = ()
    lease: float = 60.0  # seconds
    max_body: int = 32 << 20  # bytes


class Gateway:
    """`Gateway(store, Upstream("http://127.0.0.1:8090"))`, to be served by any ASGI server that knows lifespans.

    It keeps nothing that the store does not have. Its first look at the store raises LlamamemError.
    """

    def __init__(
        self, store: SessionStore, upstream: Upstream, settings: Settings | None = None, *, log: Log | None = None
    ) -> None:
        self.settings = settings or Settings()
        self.upstream = upstream
        self.metrics = Metrics()
        self.log = log or Log()
        self.draining = False
        self._store = store
        self._store_ok = True
        self._removals = store.removals()
        self._access = Access(store.keys(), needed=self.settings.needs_key, origins=self.settings.origins)
        self._sessions = HeldSessions(store, self.metrics, lease=self.settings.lease)
        self._turns = Turns(upstream, self._sessions, self.metrics)
        self._api = Api(upstream, self._sessions, self.metrics)
        self._background: set[asyncio.Task[None]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["type"] == "http":
            await self._answer(Exchange(scope, receive, send, max_body=self.settings.max_body))

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        looks = asyncio.ensure_future(self._look())
        await send({"type": "lifespan.startup.complete"})
        await receive()
        looks.cancel()
        self._sessions.close()
        await send({"type": "lifespan.shutdown.complete"})

    async def _answer(self, exchange: Exchange) -> None:
        began = time.monotonic()
        self.metrics.in_flight.inc()
        try:
            await self._route(exchange)
        except Refusal as e:
            exchange.fields["error"] = e.code or e.status
            await exchange.refuse(e)
        except ClientGone:
            exchange.fields["error"] = "client-gone"
        except Exception as e:  # a fault of ours: its text may have a piece of the request in it
            exchange.fields["error"] = f"{type(e).__name__} at {_place(e)}"
            await exchange.refuse(Refusal(500, "the gateway failed; its log has the place"))
        finally:
            self.metrics.in_flight.dec()
            fields = {"route": "other", **exchange.fields}
            self.metrics.requests.labels(fields["route"], exchange.status).inc()
            ms = round(1000 * (time.monotonic() - began), 1)
            self.log("request", method=exchange.method[:16], status=exchange.status, ms=ms, **fields)

    async def _route(self, exchange: Exchange) -> None:
        origin = self._access.check_page(exchange.headers)
        if origin is not None:
            exchange.added.append((b"access-control-allow-origin", origin.encode("latin-1")))
            exchange.added.append((b"vary", b"origin"))
        if exchange.method == "OPTIONS":
            await _preflight(exchange, allowed=origin is not None)
            return
        if exchange.raw_path == PREFIX or exchange.raw_path.startswith(PREFIX + b"/"):
            caller = self._known(exchange)
            await self._api.answer(exchange, caller.namespace)
            return
        path = split_path(exchange.raw_path)
        route = (exchange.method, path.path)
        if route in _OPEN:
            await self._open(exchange, path.path)
            return
        caller = self._known(exchange)
        if exchange.method == "POST" and path.path in GENERATES:
            exchange.fields["route"] = path.path
            await self._generate(exchange, caller, GENERATES[path.path], path)
        elif route == ("GET", "/openapi.json"):
            await exchange.answer_json(description())
        elif route == ("GET", "/metrics"):
            await self._metrics(exchange)
        elif route == ("GET", "/props"):
            await self._props(exchange)
        elif caller.operator or route in PLAIN:
            exchange.fields["route"] = path.path if route in PLAIN else "other"
            # what is no JSON the server would quote in its log; sound is none
            is_json = exchange.method == "POST" and route in PLAIN and not path.path.endswith("/transcriptions")
            content = json.dumps(await exchange.json_body()).encode() if is_json else await exchange.body()
            await self._pass(exchange, path.path, content)
        else:
            raise Refusal(403, "this is for operators: `llamamem key add --operator` makes a key for it", "operator")

    def _known(self, exchange: Exchange) -> Caller:
        caller = self._access.caller(exchange.headers)
        exchange.fields["key"] = caller.key
        return caller

    async def _generate(self, exchange: Exchange, caller: Caller, kind: Kind, path: Path) -> None:
        body = await exchange.json_body()
        asked = named(path, exchange.query, exchange.headers, body, self.settings.headers)
        if body.get("id_slot", -1) != -1 and not caller.operator:
            raise Refusal(403, "id_slot: a slot's own memory is for operators; name a session instead", "operator")
        own = body.get(asked.spelling)
        if asked.session is None or asked.mode == "off":
            if isinstance(own, dict):  # what is left of it; what is no object, the server refuses
                body = {name: value for name, value in body.items() if name != asked.spelling}
                body |= {asked.spelling: asked.extras} if asked.extras else {}
            await self._pass(exchange, path.path, json.dumps(body).encode())
            return
        if not isinstance(own, dict | None):
            raise Refusal(400, f"{asked.spelling} is not an object")
        if "memory" in asked.extras:
            raise Refusal(400, "the request brings a memory and names a session, whose memory it runs on: give one")
        if asked.mode == "on" and body.get("n", 1) not in (None, 1):
            raise Refusal(400, "n: a session goes on with one answer; ask with memory=read for more")
        exchange.fields["session"] = hashed_name(caller.namespace, asked.session)
        await self._turns.take(exchange, kind, path.path, caller.namespace, body, asked)

    async def _pass(self, exchange: Exchange, path: str, content: bytes) -> None:
        """As it is, without what is the gateway's: keys, and the names of sessions."""
        query = "&".join(
            part for part in exchange.query.decode("latin-1").split("&") if part and part.partition("=")[0] != "memory"
        )

        async def work() -> None:
            opened = self.upstream.open(
                exchange.method, quote(path), query=query, content=content or None, headers=passed_headers(exchange)
            )
            async with opened as response:
                await relay(exchange, response)

        if not await while_there(exchange, work()):
            exchange.fields["error"] = "client-gone"

    async def _open(self, exchange: Exchange, path: str) -> None:
        if path == "/":
            await self._pass(exchange, path, b"")
            return
        exchange.fields["route"] = "/health"
        server = await self.upstream.is_ready()
        ok = server and self._store_ok and not self.draining
        status = "ok" if ok else "draining" if self.draining else "error"
        told = {"status": status, "server": "ok" if server else "error", "store": "ok" if self._store_ok else "error"}
        await exchange.answer_json(told, 200 if ok else 503)

    async def _metrics(self, exchange: Exchange) -> None:
        exchange.fields["route"] = "/metrics"
        text = self.metrics.text()
        with contextlib.suppress(Refusal):
            text += await self.upstream.text("/metrics")
        await exchange.answer(200, text, "text/plain; version=0.0.4; charset=utf-8")

    async def _props(self, exchange: Exchange) -> None:
        exchange.fields["route"] = "/props"
        props = await self.upstream.ask("GET", "/props")
        await exchange.answer_json({**props, "sessions": True})

    async def _look(self) -> None:
        """Keys that were added or removed hold from here on, and what was removed leaves the server's caches."""
        while True:
            await asyncio.sleep(_LOOK)
            try:
                removals, keys = await self._sessions.run("look", lambda: (self._store.removals(), self._store.keys()))
                self._access.update(keys)
                if removals != self._removals:
                    await self.upstream.forget()
                    self._removals = removals
                ok = True
            except (LlamamemError, Refusal) as e:
                ok = isinstance(e, Refusal)  # the server is away: what it had cached is, too
            if ok != self._store_ok:
                self.log("store", ok=ok)
            self._store_ok = ok


async def _preflight(exchange: Exchange, *, allowed: bool) -> None:
    if not allowed:
        raise Refusal(403, "pages of other sites may not ask; --cors-origin names those that may", "origin")
    asked = (exchange.headers.get("access-control-request-headers") or [b"authorization, content-type"])[0]
    headers = [(b"access-control-allow-methods", b"GET, POST, PUT, DELETE"), (b"access-control-max-age", b"600")]
    await exchange.start(204, [*headers, (b"access-control-allow-headers", asked)])
    await exchange.end()


def _place(error: BaseException) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "?" if trace is None else f"{trace.tb_frame.f_code.co_filename.rpartition('/')[2]}:{trace.tb_lineno}"
