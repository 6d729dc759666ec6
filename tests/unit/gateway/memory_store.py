"""A store of sessions in this process, as the protocol has it: for tests of what is in front of a store."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from llamamem.errors import LlamamemError
from llamamem.sessions.session import (
    Conversation,
    Entry,
    Memory,
    Missing,
    Session,
    check_name,
    new_session,
    next_version,
    now,
    taken,
    undone,
)
from llamamem.sessions.store import Busy, Key, Record


class Shared:
    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.records: dict[tuple[str, str], list[Record]] = {}  # the newest, and the one before
        self.leases: dict[tuple[str, str], tuple[str, float]] = {}
        self.keys: dict[str, Key] = {}
        self.removals = 0
        self.fault: Callable[[str], Any] = lambda call: None  # called before each call; may raise


class MemoryStore:
    """`shared.fault` is what a test lets go wrong."""

    location = "memory"

    def __init__(self, shared: Shared | None = None, namespace: str = "") -> None:
        self.shared = shared or Shared()
        self.namespace = namespace

    def within(self, namespace: str) -> MemoryStore:
        return MemoryStore(self.shared, namespace)

    def close(self) -> None:
        pass

    def create(self, name: str, from_: str | None = None) -> Session:
        with self._call("create"):
            source = self._newest(from_) if from_ is not None else None
            if self._key(name) in self.shared.records:
                raise taken(name, self.location)
            session = new_session(check_name(name), source and source.session)
            self.shared.records[self._key(name)] = [Record(session, source.state if source else None, None)]
            return session

    def load(self, name: str) -> tuple[Session, bytes | None]:
        record = self.read(name)
        return record.session, record.state

    def read(self, name: str) -> Record:
        with self._call("read"):
            return self._newest(name)

    def lease(self, name: str, owner: str, seconds: float) -> Record | None:
        with self._call("lease"):
            has, until = self.shared.leases.get(self._key(name), (owner, 0.0))
            if has != owner and until > time.monotonic():
                raise Busy(name)
            self.shared.leases[self._key(name)] = (owner, time.monotonic() + seconds)
            return self._newest(name) if self._key(name) in self.shared.records else None

    def release(self, name: str, owner: str) -> None:
        with self._call("release"):
            if self.shared.leases.get(self._key(name), ("", 0))[0] == owner:
                del self.shared.leases[self._key(name)]

    def save(
        self,
        session: Session,
        memory: Memory,
        *,
        conversation: Conversation | None = None,
        origin: bytes | None = None,
        new: bool = False,
    ) -> Session:
        with self._call("save"):
            if new:
                if self._key(session.name) in self.shared.records:
                    raise LlamamemError("conflict")
                found = Record(session, None, None)
            else:
                found = self._newest(session.name)
            saved = next_version(found.session, session, memory, conversation, origin)
            self.shared.records[self._key(session.name)] = [Record(saved, memory.data, origin), found]
            return saved

    def undo(self, name: str) -> Session:
        with self._call("undo"):
            newest, *before = self.shared.records[self._key(name)]
            session = undone(newest.session, self.location)
            self.shared.records[self._key(name)] = [before[0]._replace(session=session), newest]
            return session

    def entries(self, *, after: str | None = None, limit: int | None = None, verify: bool = False) -> list[Entry]:
        with self._call("list"):
            names = sorted(name for namespace, name in self.shared.records if namespace == self.namespace)
            names = [name for name in names if after is None or name > after][:limit]
            return [Entry(name, self._newest(name).session) for name in names]

    def names(self, start: str, limit: int) -> list[str]:
        return [entry.label for entry in self.entries() if entry.label.startswith(start)][:limit]

    def remove(self, name: str) -> None:
        with self._call("remove"):
            self._newest(name)
            del self.shared.records[self._key(name)]
            self.shared.removals += 1

    def prune(self, older_than: timedelta) -> list[str]:
        old = [e.label for e in self.entries() if e.session and e.session.used < now() - older_than]
        for name in old:
            self.remove(name)
        return old

    def total_bytes(self) -> int:
        return sum(len(found[0].state or b"") + len(found[0].origin or b"") for found in self.shared.records.values())

    def removals(self) -> int:
        with self._call("removals"):
            return self.shared.removals

    def keys(self) -> list[Key]:
        with self._call("keys"):
            return list(self.shared.keys.values())

    def add_key(self, key: Key) -> None:
        self.shared.keys[key.id] = key

    def remove_key(self, id: str) -> Key:
        return self.shared.keys.pop(id)

    def _key(self, name: str) -> tuple[str, str]:
        return self.namespace, name

    def _newest(self, name: str) -> Record:
        if self._key(name) not in self.shared.records:
            raise Missing(name, self.location)
        return self.shared.records[self._key(name)][0]

    def _call(self, what: str) -> threading.RLock:
        self.shared.fault(what)
        return self.shared.lock
