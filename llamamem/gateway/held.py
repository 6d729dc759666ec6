"""Sessions, one request at a time each: in order within this gateway, by a lease across gateways."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from llamamem.errors import LlamamemError
from llamamem.gateway.metrics import Metrics
from llamamem.sessions.session import Conversation, Memory, Session, new_session
from llamamem.sessions.store import Busy, Record, SessionStore, Unreachable

T = TypeVar("T")

_POLL = 0.02, 0.25  # seconds between looks at a lease that another has, at first and at last
_THREADS = 16


class Held:
    """A session that is this request's until the block ends. `record` is None as long as there is none."""

    def __init__(
        self, sessions: HeldSessions, store: SessionStore, name: str, record: Record | None, renewal: asyncio.Task[None]
    ) -> None:
        self.name = name
        self.record = record
        self.store = store
        self.released = False
        self._sessions = sessions
        self._renewal = renewal

    @property
    def session(self) -> Session | None:
        return None if self.record is None else self.record.session

    async def save(
        self, memory: Memory, conversation: Conversation | None = None, origin: bytes | None = None
    ) -> Session:
        """The next generation, or the first one. Once begun it is done, also when the request is cancelled."""
        session = self.session or new_session(self.name, None)
        new = self.record is None

        def save() -> Session:
            saved = self.store.save(session, memory, conversation=conversation, origin=origin, new=new)
            self._sessions.release(self.store, self.name)  # in the same thread: another switch would cost as much
            return saved

        await _ended(self._renewal)
        saved = await _through(self._sessions.run("save", save))
        self.released = True
        self.record = Record(saved, memory.data, origin)
        return saved


class HeldSessions:
    """The sessions of a store, for the requests of one gateway. `lease` is in seconds: how long one that died keeps
    others away, and how long a request waits for another gateway."""

    def __init__(self, store: SessionStore, metrics: Metrics, *, lease: float = 60.0) -> None:
        self.store = store
        self.owner = secrets.token_hex(8)
        self._lease = lease
        self._metrics = metrics
        self._locks: dict[tuple[str, str], tuple[asyncio.Lock, int]] = {}
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="store")

    async def run(self, what: str, call: Callable[[], T]) -> T:
        """A call of the store, in a thread."""
        began = time.monotonic()
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, call)
        except Unreachable:
            self._metrics.store_errors.labels(what).inc()
            raise
        finally:
            self._metrics.store_seconds.labels(what).observe(time.monotonic() - began)

    @asynccontextmanager
    async def held(self, namespace: str, name: str) -> AsyncIterator[Held]:
        """Waits for its turn. Raises Busy when another gateway keeps the session for longer than a lease."""
        async with self._in_order(namespace, name):
            store = self.store.within(namespace)
            record = await self._take(store, name)
            renewal = asyncio.ensure_future(self._renew(store, name))
            held = Held(self, store, name, record, renewal)
            try:
                yield held
            finally:
                await _through(self._give_back(held, renewal))

    def close(self) -> None:
        self._threads.shutdown(wait=True)
        self.store.close()

    async def _take(self, store: SessionStore, name: str) -> Record | None:
        until, pause = time.monotonic() + self._lease, _POLL[0]
        while True:
            try:
                return await self._leased(store, name)
            except Busy:
                if time.monotonic() > until:
                    self._metrics.conflicts.labels("lease").inc()
                    raise
            await asyncio.sleep(pause)
            pause = min(2 * pause, _POLL[1])

    async def _leased(self, store: SessionStore, name: str) -> Record | None:
        """A lease that was taken while the request was cancelled is given back."""
        try:
            return await _through(self.run("lease", lambda: store.lease(name, self.owner, self._lease)))
        except asyncio.CancelledError:
            await self._release(store, name)
            raise

    async def _renew(self, store: SessionStore, name: str) -> None:
        while True:
            await asyncio.sleep(self._lease / 3)
            with contextlib.suppress(LlamamemError):  # whoever has it by now, the save tells
                await _through(self.run("lease", lambda: store.lease(name, self.owner, self._lease)))

    def release(self, store: SessionStore, name: str) -> None:
        with contextlib.suppress(LlamamemError):  # it runs out by itself
            store.release(name, self.owner)

    async def _give_back(self, held: Held, renewal: asyncio.Task[None]) -> None:
        await _ended(renewal)
        if not held.released:
            await self._release(held.store, held.name)

    async def _release(self, store: SessionStore, name: str) -> None:
        await self.run("release", lambda: self.release(store, name))

    @asynccontextmanager
    async def _in_order(self, namespace: str, name: str) -> AsyncIterator[None]:
        key = (namespace, name)
        lock, waiting = self._locks.get(key, (asyncio.Lock(), 0))
        self._locks[key] = (lock, waiting + 1)
        try:
            async with lock:
                yield
        finally:
            lock, waiting = self._locks[key]
            self._locks[key] = (lock, waiting - 1)
            if waiting == 1:
                del self._locks[key]


async def _ended(renewal: asyncio.Task[None]) -> None:
    """No renewal is under way any more: it would take the lease again after it was given back."""
    renewal.cancel()
    await asyncio.wait((renewal,))


async def _through(work: Coroutine[Any, Any, T]) -> T:
    """To its end, also when the request is cancelled meanwhile, and cancelled then."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait((task,))
        if not task.cancelled():
            task.exception()  # of which nobody else is told
        raise
