"""Sessions in one SQLite file: a row each, a transaction a change."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

from llamamem.errors import LlamamemError
from llamamem.sessions.session import (
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
)

_APPLICATION = 0x524D5653  # "RMVS": no other program's file is taken for a store
_VERSION = 1
_LOCK_TIMEOUT = 60.0  # seconds; a change takes milliseconds
_SCHEMA = "CREATE TABLE session (name TEXT PRIMARY KEY NOT NULL, metadata TEXT NOT NULL, state BLOB)"


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
            db.execute("INSERT INTO session VALUES (?, ?, ?)", (name, session.model_dump_json(), state))
            self._check_quota(db, len(state or b""))
        return session

    def load(self, name: str) -> tuple[Session, bytes | None]:
        check_name(name)
        with self._change() as db:
            return self._use(db, name)

    def save(self, session: Session, memory: Memory) -> Session:
        with self._change() as db:
            found, state = self._read(db, session.name)
            saved = next_version(found, session, memory)
            row = (saved.model_dump_json(), memory.data, saved.name)
            db.execute("UPDATE session SET metadata = ?, state = ? WHERE name = ?", row)
            self._check_quota(db, len(memory.data) - len(state or b""))
        return saved

    def entries(self) -> list[Entry]:
        with self._change() as db:
            return _entries(db)

    def remove(self, name: str) -> None:
        check_name(name)
        with self._change() as db:
            if db.execute("DELETE FROM session WHERE name = ?", (name,)).rowcount == 0:
                raise Missing(name, self.location)

    def prune(self, older_than: timedelta) -> list[str]:
        limit = now() - older_than
        with self._change() as db:
            old = [e.label for e in _entries(db) if e.session and e.fault is None and e.session.used < limit]
            db.executemany("DELETE FROM session WHERE name = ?", [(name,) for name in old])
        return old

    def total_bytes(self) -> int:
        with self._change() as db:
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
            return _checked(name, *row)
        except Damaged as e:
            raise damaged(name, self.location, e) from None

    def _check_quota(self, db: sqlite3.Connection, more: int) -> None:
        if more > 0:
            check_quota(self.location, self.quota, _total(db))

    @contextlib.contextmanager
    def _change(self, *, make: bool = False) -> Iterator[sqlite3.Connection]:
        """A connection in a transaction that is committed at the end, or rolled back by an error."""
        try:
            if make and not self.path.exists():
                self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                self.path.touch(mode=0o600)  # what somebody said may be read out of a memory
            file = self.path if self.path.exists() else ":memory:"  # a store that is not there is an empty one
            with contextlib.closing(sqlite3.connect(file, timeout=_LOCK_TIMEOUT, isolation_level=None)) as db:
                db.text_factory = lambda text: text.decode("utf-8", "replace")  # damage is reported by who reads it
                db.execute("PRAGMA synchronous = FULL")
                db.execute("BEGIN IMMEDIATE")
                with db:  # commits, or rolls back
                    self._check_file(db)
                    yield db
        except sqlite3.OperationalError as e:
            raise LlamamemError(
                f"{self.path}: the store cannot be read or changed ({e}); see to the disk, to who may write there and"
                " to who else has it open"
            ) from None
        except sqlite3.DatabaseError as e:
            raise LlamamemError(f"{self.path}: not a store of sessions, or damaged ({e}); give another file") from None
        except OSError as e:
            raise LlamamemError(f"{self.path}: the store cannot be made ({e.strerror}); give another --store") from None

    def _check_file(self, db: sqlite3.Connection) -> None:
        application, version = (
            db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")
        )
        if (application, version) == (_APPLICATION, _VERSION):
            return
        if application == _APPLICATION:
            raise LlamamemError(f"{self.path}: a store of version {version}, this llamamem reads {_VERSION}; update it")
        if db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            raise LlamamemError(f"{self.path}: another program's database; give another file as --store sqlite:FILE")
        db.execute(_SCHEMA)
        db.execute(f"PRAGMA application_id = {_APPLICATION}")
        db.execute(f"PRAGMA user_version = {_VERSION}")


def _row(db: sqlite3.Connection, name: str) -> tuple[str, bytes | None] | None:
    row: tuple[str, bytes | None] | None = db.execute(
        "SELECT metadata, CAST(state AS BLOB) FROM session WHERE name = ?", (name,)
    ).fetchone()
    return row


def _entries(db: sqlite3.Connection) -> list[Entry]:
    return [_entry(*row) for row in db.execute("SELECT name, metadata, CAST(state AS BLOB) FROM session ORDER BY name")]


def _total(db: sqlite3.Connection) -> int:
    return int(db.execute("SELECT coalesce(sum(length(state)), 0) FROM session").fetchone()[0])


def _checked(name: str, metadata: str, state: bytes | None) -> tuple[Session, bytes | None]:
    session = read_session(metadata)
    if session.name != name:
        raise Damaged(f"its metadata is that of {session.name!r}")
    check_state(session, state)
    return session, state


def _entry(name: str, metadata: str, state: bytes | None) -> Entry:
    session = None
    try:
        session = read_session(metadata)
        _checked(name, metadata, state)
    except Damaged as e:
        return Entry(name, session, str(e))
    return Entry(name, session)
