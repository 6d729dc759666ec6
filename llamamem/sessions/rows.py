"""What the stores have in common: a session is a row, and a change replaces the row that was read, or nothing.

A store of a kind has the small steps that begin with an underscore, each of them whole or not at all, and no logic.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from datetime import timedelta
from typing import NamedTuple, TypeVar

from pydantic import ValidationError

from llamamem.errors import LlamamemError
from llamamem.sessions.session import (
    MISSING,
    WRONG_LENGTH,
    Conflict,
    Conversation,
    Damaged,
    Entry,
    Generation,
    Memory,
    Missing,
    Session,
    check_name,
    check_state,
    damaged,
    new_session,
    next_version,
    now,
    read_session,
    taken,
    undone,
)
from llamamem.sessions.store import Busy, Full, Key, Record, Unreachable

_Self = TypeVar("_Self", bound="Rows")

_AT_ONCE = 1000  # sessions that are looked at in one step

Memories = tuple[bytes | None, bytes | None]  # the state, and the origin of the open conversation


class Row(NamedTuple):
    metadata: str  # as it was read: what a change compares with
    memories: Memories
    before: Memories = (None, None)  # only if it was asked for


class Rows:
    """What SessionStore promises, made of the steps of a kind of store. Its methods are told there."""

    namespace = ""
    quota: int | None = None

    @property
    def location(self) -> str:
        raise NotImplementedError

    def _get(self, name: str, *, before: bool = False) -> Row | None:
        """Raises Damaged for what is there and cannot be read."""
        raise NotImplementedError

    def _put(self, name: str, expected: str | None, session: Session, memories: Memories | None, more: int) -> bool:
        """Writes the session if the metadata there are `expected` (None: nothing is there); tells whether they were.

        With `memories` those that are there become the ones before, else all of them stay. `more` is what the bytes of
        memories grow by. What `session` says already is written already: a step that is done twice is done. Raises
        Full when `more` would go over the quota.
        """
        raise NotImplementedError

    def _delete(self, name: str, expected: str | None) -> bool:
        """All of it, if the metadata are `expected` (None: whatever they are); tells whether anything was there."""
        raise NotImplementedError

    def _page(self, after: str, limit: int) -> list[Entry]:
        """By the store's order of labels; a page with none is the last. States are not read."""
        raise NotImplementedError

    def _names(self, start: str, limit: int) -> list[str]:
        raise NotImplementedError

    def _total(self) -> int:
        raise NotImplementedError

    def _take(self, name: str, owner: str, seconds: float) -> float | None:
        """Takes the lease; else for how many seconds another owner has it."""
        raise NotImplementedError

    def _let_go(self, name: str, owner: str) -> None:
        raise NotImplementedError

    def _key_texts(self) -> list[str]:
        raise NotImplementedError

    def _add_key_text(self, id: str, text: str) -> bool:
        raise NotImplementedError

    def _remove_key_text(self, id: str) -> str | None:
        raise NotImplementedError

    def within(self: _Self, namespace: str) -> _Self:
        other = copy.copy(self)
        other.namespace = namespace
        return other

    def close(self) -> None:
        pass

    def create(self, name: str, from_: str | None = None) -> Session:
        check_name(name)
        source, state = self.load(from_) if from_ is not None else (None, None)
        session = new_session(name, source)
        if not self._put(name, None, session, (state, None), len(state or b"")):
            self._found(name)  # raises when it is damaged
            raise taken(name, self.location)
        return session

    def load(self, name: str) -> tuple[Session, bytes | None]:
        while True:
            row, session = self._found(name)
            used = session.model_copy(update={"used": now()})
            try:
                if self._put(name, row.metadata, used, None, 0):
                    return used, row.memories[0]
            except (Full, Unreachable):  # where nothing can be written, the time of its use is all that is lost
                return session, row.memories[0]

    def read(self, name: str) -> Record:
        row, session = self._found(name)
        return Record(session, *row.memories)

    def lease(self, name: str, owner: str, seconds: float) -> Record | None:
        left = self._take(check_name(name), owner, seconds)
        if left is not None:
            raise Busy(name, now() + timedelta(seconds=left))
        try:
            return self.read(name)
        except Missing:
            return None
        except LlamamemError:
            self._let_go(name, owner)
            raise

    def release(self, name: str, owner: str) -> None:
        self._let_go(check_name(name), owner)

    def save(
        self,
        session: Session,
        memory: Memory,
        *,
        conversation: Conversation | None = None,
        origin: bytes | None = None,
        new: bool = False,
    ) -> Session:
        name = check_name(session.name)
        origin = None if conversation is None else origin
        while True:
            row, found = (None, session) if new else self._found(name)
            saved = next_version(found, session, memory, conversation, origin)
            more = _bytes(saved) - (0 if row is None else _bytes(found))
            if self._put(name, row and row.metadata, saved, (memory.data, origin), more):
                return saved
            if new:
                raise Conflict(session, self._found(name)[1])

    def undo(self, name: str) -> Session:
        while True:
            row, found = self._found(name, before=True)
            saved = undone(found, self.location)
            assert found.before is not None
            try:
                _check(found.before, row.before)
            except Damaged as e:
                raise LlamamemError(
                    f"session {name!r} in {self.location}: generation {found.before.generation} cannot be brought back:"
                    f" {e}; generation {found.generation} stays"
                ) from None
            if self._put(name, row.metadata, saved, row.before, _bytes(saved) - _bytes(found)):
                return saved

    def entries(self, *, after: str | None = None, limit: int | None = None, verify: bool = False) -> list[Entry]:
        found: list[Entry] = []
        last = "" if after is None else after
        while limit is None or len(found) < limit:
            page = self._page(last, _AT_ONCE if limit is None else min(limit - len(found), _AT_ONCE))
            if not page:
                break
            last = page[-1].label
            found += page
        if verify:
            found = [entry if entry.fault else self._verified(entry) for entry in found]
        return found if after is not None or limit is not None else sorted(found, key=lambda entry: entry.label)

    def names(self, start: str, limit: int) -> list[str]:
        return self._names(start, limit)

    def remove(self, name: str) -> None:
        if not self._delete(check_name(name), None):
            raise Missing(name, self.location)

    def prune(self, older_than: timedelta) -> list[str]:
        limit = now() - older_than

        def old() -> Iterator[str]:
            for entry in self.entries():
                if entry.session is not None and entry.fault is None and entry.session.used < limit:
                    yield entry.label

        removed = []
        for name in old():
            try:
                row, session = self._found(name)  # it may have been used by now, and what is damaged stays
            except LlamamemError as e:
                if isinstance(e, Unreachable):
                    raise
                continue
            if session.used < limit and self._delete(name, row.metadata):
                removed.append(name)
        return sorted(removed)

    def total_bytes(self) -> int:
        return self._total()

    def removals(self) -> int:
        raise NotImplementedError

    def keys(self) -> list[Key]:
        try:
            return sorted((Key.model_validate_json(text) for text in self._key_texts()), key=lambda key: key.created)
        except ValidationError as e:
            raise LlamamemError(
                f"{self.location}: a key is damaged ({e.errors()[0]['msg']}); remove it with `llamamem key rm`"
            ) from None

    def add_key(self, key: Key) -> None:
        if not self._add_key_text(key.id, key.model_dump_json()):
            raise LlamamemError(f"key {key.id}: is in {self.location} already; add one with another id")

    def remove_key(self, id: str) -> Key:
        text = self._remove_key_text(id)
        if text is None:
            raise LlamamemError(f"key {id!r}: not in {self.location}; `llamamem key list` shows those that are")
        return Key.model_validate_json(text)

    def _found(self, name: str, *, before: bool = False) -> tuple[Row, Session]:
        try:
            row = self._get(check_name(name), before=before)
            if row is None:
                raise Missing(name, self.location)
            session = named(name, row.metadata)
            _check(session, row.memories)
        except Damaged as e:
            raise damaged(name, self.location, e) from None
        return row, session

    def _verified(self, entry: Entry) -> Entry:
        """The same entry, with what the bytes of its memories show."""
        assert entry.session is not None
        try:
            row = self._get(entry.label) or Row("", (None, None))
            _check(named(entry.label, row.metadata) if row.metadata else entry.session, row.memories)
        except Damaged as e:
            return Entry(entry.label, entry.session, str(e))
        return entry

    def _check_quota(self, total: int) -> None:
        if self.quota is not None and total > self.quota:
            raise Full(
                f"{self.location}: {total} bytes of states would be over the quota of {self.quota}; nothing was saved;"
                " make room with `llamamem session rm` or `prune`, or give a larger --quota"
            )


def named(name: str, metadata: str | bytes) -> Session:
    """Raises Damaged when the metadata are not those of this session."""
    session = read_session(metadata)
    if session.name != name:
        raise Damaged(f"its metadata is that of {session.name!r}")
    return session


def seen(name: str, metadata: str | bytes | None, state: int | None, origin: int | None) -> Entry:
    """A line of a list, of the lengths of what is there; a length is None of what is not there."""
    session = None
    try:
        if metadata is None:
            raise Damaged("its metadata is missing: it is half-removed, or was taken away")
        session = named(name, metadata)
        check_lengths(session, state, origin)
    except Damaged as e:
        return Entry(name, session, str(e))
    return Entry(name, session)


def check_lengths(session: Generation, state: int | None, origin: int | None) -> None:
    """Raises Damaged."""
    if session.state_sha256 is None and state is not None:
        raise Damaged("it has a state that its metadata does not know of")
    if (session.state_sha256 is not None and state is None) or (session.origin_sha256 is not None and origin is None):
        raise Damaged(MISSING)
    if (state or 0) != session.n_bytes or (origin is not None and origin != session.origin_bytes):
        raise Damaged(WRONG_LENGTH)


def _check(generation: Generation, memories: Memories) -> None:
    """Raises Damaged."""
    state, origin = memories
    check_state(generation, state)
    if generation.origin_sha256 is None:
        return
    if origin is None:
        raise Damaged("the memory on which its conversation began is missing")
    if hashlib.sha256(origin).hexdigest() != generation.origin_sha256:
        raise Damaged("the memory on which its conversation began is damaged: it has not the hash in its metadata")


def _bytes(generation: Generation) -> int:
    return generation.n_bytes + generation.origin_bytes
