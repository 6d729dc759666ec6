"""Sessions in one SQLite file: a row each, a transaction a change."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from llamamem.errors import LlamamemError
from llamamem.formats.private import private_directory
from llamamem.sessions.session import (
    MISSING,
    WRONG_BYTES,
    WRONG_LENGTH,
    Damaged,
    Entry,
    Memory,
    Missing,
    Session,
    check_name,
    check_quota,
    check_state,
    damaged,
    new_session,
    next_version,
    now,
    read_session,
    taken,
    undone,
)

_APPLICATION = 0x524D5653  # "RMVS": no other program's file is taken for a store
_VERSION = 2  # 1 had no generation before
_LOCK_TIMEOUT = 60.0  # seconds; a change takes milliseconds
_SCHEMA = "CREATE TABLE session (name TEXT PRIMARY KEY NOT NULL, metadata TEXT NOT NULL, state BLOB, before BLOB)"
# of the state, only how long it is and whether it is one: that much is read without the rest
_LOOK = "SELECT name, metadata, typeof(state), length(state) FROM session WHERE name > ? ORDER BY name LIMIT ?"

_T = TypeVar("_T")


class SqliteStore:
    """`SqliteStore("sessions.db", quota=10_000_000)`; the file is made with the first session."""

    def __init__(self, path: str | Path, *, quota: int | None = None) -> None:
        self.path = Path(path).expanduser().absolute()
        self.quota = quota

    @property
    def location(self) -> str:
        return f"sqlite:{self.path}"

    def create(self, name: str, from_: str | None = None) -> Session:
        check_name(name)
        with self._change(make=True) as db:
            source, state = self._use(db, from_) if from_ is not None else (None, None)
            if _row(db, name) is not None:
                self._read(db, name)  # raises when it is damaged
                raise taken(name, self.location)
            session = new_session(name, source)
            db.execute("INSERT INTO session VALUES (?, ?, ?, NULL)", (name, session.model_dump_json(), state))
            self._check_quota(db, len(state or b""))
        return session

    def load(self, name: str) -> tuple[Session, bytes | None]:
        check_name(name)
        try:
            with self._opened(write=True) as db:
                return self._use(db, name)
        except sqlite3.OperationalError as e:
            if _is_locked(e):
                raise self._fault(e) from None
        # on a full or read-only disk, the time of its use is all that is lost
        with self._look() as db:
            return self._read(db, name)

    def save(self, session: Session, memory: Memory) -> Session:
        with self._change() as db:
            found, state = self._read(db, session.name)
            saved = next_version(found, session, memory)
            self._replace(db, saved, memory.data)
            self._check_quota(db, len(memory.data) - len(state or b""))
        return saved

    def undo(self, name: str) -> Session:
        check_name(name)
        with self._change() as db:
            found, state = self._read(db, name)
            saved = undone(found, self.location)
            assert found.before is not None
            before: bytes | None = db.execute(
                "SELECT CAST(before AS BLOB) FROM session WHERE name = ?", (name,)
            ).fetchone()[0]
            try:
                check_state(found.before, before)
            except Damaged as e:
                raise LlamamemError(
                    f"session {name!r} in {self.location}: generation {found.before.generation} cannot be brought back:"
                    f" {e}; generation {found.generation} stays"
                ) from None
            self._replace(db, saved, before)
            self._check_quota(db, len(before or b"") - len(state or b""))
        return saved

    def entries(self, *, after: str | None = None, limit: int | None = None, verify: bool = False) -> list[Entry]:
        with self._look() as db:
            found = db.execute(_LOOK, ("" if after is None else after, -1 if limit is None else limit))
            entries = [_entry(*row) for row in found]
            if verify:
                entries = [e if e.fault else _verified(e, _row(db, e.label)) for e in entries]
        return entries

    def names(self, start: str, limit: int) -> list[str]:
        with self._look() as db:
            found = db.execute("SELECT name FROM session WHERE name >= ? ORDER BY name", (start,))
            names: list[str] = []
            for (name,) in found:
                if not str(name).startswith(start) or len(names) >= limit:
                    break
                names.append(name)
        return names

    def remove(self, name: str) -> None:
        check_name(name)

        def delete(db: sqlite3.Connection) -> None:
            if db.execute("DELETE FROM session WHERE name = ?", (name,)).rowcount == 0:
                raise Missing(name, self.location)

        self._delete(delete)

    def prune(self, older_than: timedelta) -> list[str]:
        limit = now() - older_than

        def delete(db: sqlite3.Connection) -> list[str]:
            whole = [e for e in (_entry(*row) for row in db.execute(_LOOK, ("", -1))) if e.session and not e.fault]
            old = [e for e in whole if e.session and e.session.used < limit]
            names = [e.label for e in old if _verified(e, _row(db, e.label)).fault is None]
            db.executemany("DELETE FROM session WHERE name = ?", [(name,) for name in names])
            return names

        return self._delete(delete)

    def total_bytes(self) -> int:
        with self._look() as db:
            return _total(db)

    def _use(self, db: sqlite3.Connection, name: str) -> tuple[Session, bytes | None]:
        session, state = self._read(db, name)
        session = session.model_copy(update={"used": now()})
        db.execute("UPDATE session SET metadata = ? WHERE name = ?", (session.model_dump_json(), name))
        return session, state

    def _read(self, db: sqlite3.Connection, name: str) -> tuple[Session, bytes | None]:
        row = _row(db, name)
        if row is None:
            raise Missing(name, self.location)
        try:
            session = _session(name, row[0])
            check_state(session, row[1])
        except Damaged as e:
            raise damaged(name, self.location, e) from None
        return session, row[1]

    def _replace(self, db: sqlite3.Connection, saved: Session, state: bytes | None) -> None:
        row = (saved.model_dump_json(), state, saved.name)
        db.execute("UPDATE session SET metadata = ?, before = state, state = ? WHERE name = ?", row)

    def _check_quota(self, db: sqlite3.Connection, more: int) -> None:
        if more > 0:
            check_quota(self.location, self.quota, _total(db))

    def _delete(self, delete: Callable[[sqlite3.Connection], _T]) -> _T:
        """On a full disk too, where a journal beside the file has no room: then it is kept in RAM."""
        try:
            with self._opened(write=True) as db:
                return delete(db)
        except sqlite3.OperationalError as e:
            if "full" not in str(e) and "disk I/O" not in str(e):
                raise self._fault(e) from None
        with self._change(journal="MEMORY") as db:
            return delete(db)

    @contextlib.contextmanager
    def _change(self, *, make: bool = False, journal: str | None = None) -> Iterator[sqlite3.Connection]:
        """A connection in a transaction that is committed at the end, or rolled back by an error."""
        try:
            with self._opened(write=True, make=make, journal=journal) as db:
                yield db
        except sqlite3.OperationalError as e:
            raise self._fault(e) from None

    @contextlib.contextmanager
    def _look(self) -> Iterator[sqlite3.Connection]:
        """A connection that changes nothing, not even a file of an older version."""
        try:
            with self._opened(write=False) as db:
                yield db
        except sqlite3.OperationalError as e:
            raise self._fault(e) from None

    @contextlib.contextmanager
    def _opened(self, *, write: bool, make: bool = False, journal: str | None = None) -> Iterator[sqlite3.Connection]:
        """Leaves sqlite3.OperationalError to the caller."""
        try:
            if make and not self.path.exists():
                if not self.path.parent.exists():
                    private_directory(self.path.parent)
                self.path.touch(mode=0o600)  # what somebody said may be read out of a memory
            there = self.path.exists()  # a store that is not there is an empty one
            if there and not self.path.is_file():  # a device of zeros would be one too
                raise LlamamemError(f"{self.location}: is not a file; give another place")
            if there and make and self.path.stat().st_mode & 0o077:
                self.path.chmod(0o600)
            place = f"{self.path.as_uri()}?mode=rw" if there else ":memory:"  # one that cannot be written is read
            with contextlib.closing(
                sqlite3.connect(place, timeout=_LOCK_TIMEOUT, isolation_level=None, uri=there)
            ) as db:
                db.text_factory = lambda text: text.decode("utf-8", "replace")  # damage is reported by who reads it
                db.execute("PRAGMA synchronous = FULL")
                db.execute("PRAGMA secure_delete = ON")  # what is forgotten is not left in free pages
                if journal is not None:
                    db.execute(f"PRAGMA journal_mode = {journal}")
                writes = write or not there
                db.execute("BEGIN IMMEDIATE" if writes else "BEGIN")
                with db:  # commits, or rolls back
                    self._check_file(db, writes)
                    yield db
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError as e:
            raise LlamamemError(f"{self.path}: not a store of sessions, or damaged ({e}); give another file") from None
        except OSError as e:
            raise LlamamemError(f"{self.path}: the store cannot be made ({e.strerror}); give another --store") from None

    def _fault(self, error: sqlite3.OperationalError) -> LlamamemError:
        return LlamamemError(
            f"{self.path}: the store cannot be read or changed ({error}); see to the disk, to who may write there and"
            " to who else has it open"
        )

    def _check_file(self, db: sqlite3.Connection, write: bool) -> None:
        application, version = (
            db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")
        )
        if (application, version) == (_APPLICATION, _VERSION):
            return
        if application == _APPLICATION and version > _VERSION:
            raise LlamamemError(f"{self.path}: a store of version {version}, this llamamem reads {_VERSION}; update it")
        if application != _APPLICATION and db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            raise LlamamemError(f"{self.path}: another program's database; give another file as --store sqlite:FILE")
        if application == _APPLICATION and write:
            db.execute("ALTER TABLE session ADD COLUMN before BLOB")
        elif application != _APPLICATION:
            db.execute(_SCHEMA if write else f"CREATE TEMP {_SCHEMA.removeprefix('CREATE ')}")
        if write:
            db.execute(f"PRAGMA application_id = {_APPLICATION}")
            db.execute(f"PRAGMA user_version = {_VERSION}")


def _is_locked(error: sqlite3.OperationalError) -> bool:
    return "locked" in str(error)


def _row(db: sqlite3.Connection, name: str) -> tuple[str, bytes | None] | None:
    row: tuple[str, bytes | None] | None = db.execute(
        "SELECT metadata, CAST(state AS BLOB) FROM session WHERE name = ?", (name,)
    ).fetchone()
    return row


def _total(db: sqlite3.Connection) -> int:
    return int(db.execute("SELECT coalesce(sum(length(state)), 0) FROM session").fetchone()[0])


def _session(name: str, metadata: str) -> Session:
    session = read_session(metadata)
    if session.name != name:
        raise Damaged(f"its metadata is that of {session.name!r}")
    return session


def _entry(name: str, metadata: Any, kind: str, length: int | None) -> Entry:
    session = None
    try:
        session = _session(name, metadata)
        if session.state_sha256 is None and kind != "null":
            raise Damaged("it has a state that its metadata does not know of")
        if session.state_sha256 is not None and kind == "null":
            raise Damaged(MISSING)
        if kind not in ("null", "blob"):
            raise Damaged(WRONG_BYTES)
        if kind == "blob" and length != session.n_bytes:
            raise Damaged(WRONG_LENGTH)
    except Damaged as e:
        return Entry(name, session, str(e))
    return Entry(name, session)


def _verified(entry: Entry, row: tuple[str, bytes | None] | None) -> Entry:
    """The same entry, with what its state's bytes show."""
    assert entry.session is not None
    try:
        check_state(entry.session, row and row[1])
    except Damaged as e:
        return Entry(entry.label, entry.session, str(e))
    return entry
