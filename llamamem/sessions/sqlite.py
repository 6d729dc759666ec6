"""Sessions in one SQLite file: a row each, a transaction a change."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from llamamem.errors import LlamamemError
from llamamem.formats.private import private_directory
from llamamem.sessions.leases import Leases
from llamamem.sessions.rows import Memories, Row, Rows, seen
from llamamem.sessions.session import Damaged, Entry, Session
from llamamem.sessions.store import Full, Unreachable

_APPLICATION = 0x524D5653  # "RMVS": no other program's file is taken for a store
_VERSION = 3  # 1 had no generation before, 2 no namespaces
_LOCK_TIMEOUT = 60.0  # seconds; a change takes milliseconds
_SCHEMA = (
    "CREATE TABLE session (namespace TEXT NOT NULL, name TEXT NOT NULL, metadata TEXT NOT NULL, state BLOB,"
    " origin BLOB, before BLOB, before_origin BLOB, PRIMARY KEY (namespace, name))",
    "CREATE TABLE used (namespace TEXT PRIMARY KEY NOT NULL, bytes INTEGER NOT NULL)",
    "CREATE TABLE key (id TEXT PRIMARY KEY NOT NULL, text TEXT NOT NULL)",
    "CREATE TABLE removals (n INTEGER NOT NULL)",
    "INSERT INTO removals VALUES (0)",
)
_OF = "WHERE namespace = ? AND name = ?"
_LENGTHS = "coalesce(length(CAST(state AS BLOB)), 0) + coalesce(length(CAST(origin AS BLOB)), 0)"
# of the states, only how long they are and whether they are: that much is read without the rest
_LOOK = (
    "SELECT name, metadata, iif(typeof(state) IN ('null', 'blob'), length(state), -1), length(origin) FROM session"
    " WHERE namespace = ? AND name > ? ORDER BY name LIMIT ?"
)

_T = TypeVar("_T")


class SqliteStore(Rows):
    """`SqliteStore("sessions.db", quota=10_000_000)`; the file is made with the first session.

    It is for the processes of one machine. Nothing that was acknowledged is lost when processes die, nor when the
    machine does: each change is flushed before it returns. Leases are in a file beside it, `sessions.db-leases`.
    """

    def __init__(self, path: str | Path, *, quota: int | None = None) -> None:
        self.path = Path(path).expanduser().absolute()
        self.quota = quota
        self._turn = (
            threading.Lock()
        )  # of this process' threads one writes at a time: SQLite lets waiters try by chance
        self._leases = Leases(self.path.with_name(f"{self.path.name}-leases"))

    @property
    def location(self) -> str:
        return f"sqlite:{self.path}"

    def close(self) -> None:
        self._leases.close()

    def _get(self, name: str, *, before: bool = False) -> Row | None:
        columns = ("metadata", "state", "origin", *(("before", "before_origin") if before else ()))
        wanted = ", ".join(f"CAST({column} AS BLOB)" for column in columns)
        with self._look() as db:
            row = db.execute(f"SELECT {wanted} FROM session {_OF}", (self.namespace, name)).fetchone()
        if row is None:
            return None
        return Row(_text(row[0]), (row[1], row[2]), (row[3], row[4]) if before else (None, None))

    def _put(self, name: str, expected: str | None, session: Session, memories: Memories | None, more: int) -> bool:
        text = session.model_dump_json()
        with self._change(make=expected is None) as db:
            found = db.execute(f"SELECT CAST(metadata AS BLOB) FROM session {_OF}", (self.namespace, name)).fetchone()
            there = None if found is None else found[0]
            if there != (expected and expected.encode()):
                return bool(there == text.encode())
            if expected is None:
                row = (self.namespace, name, text, *(memories or (None, None)))
                db.execute("INSERT INTO session VALUES (?, ?, ?, ?, ?, NULL, NULL)", row)
            elif memories is None:
                db.execute(f"UPDATE session SET metadata = ? {_OF}", (text, self.namespace, name))
            else:
                db.execute(
                    "UPDATE session SET metadata = ?, before = state, before_origin = origin, state = ?, origin = ?"
                    f" {_OF}",
                    (text, *memories, self.namespace, name),
                )
            if more:
                self._count(db, more)
        return True

    def _delete(self, name: str, expected: str | None) -> bool:
        def delete(db: sqlite3.Connection) -> bool:
            found = db.execute(f"SELECT metadata, {_LENGTHS} FROM session {_OF}", (self.namespace, name)).fetchone()
            if found is None or (expected is not None and found[0] != expected):
                return False
            db.execute(f"DELETE FROM session {_OF}", (self.namespace, name))
            if found[1]:
                self._count(db, -found[1])
            db.execute("UPDATE removals SET n = n + 1")
            return True

        return self._on_a_full_disk_too(delete)

    def _page(self, after: str, limit: int) -> list[Entry]:
        with self._look() as db:
            return [seen(*row) for row in db.execute(_LOOK, (self.namespace, after, limit))]

    def _names(self, start: str, limit: int) -> list[str]:
        query = "SELECT name FROM session WHERE namespace = ? AND name >= ? ORDER BY name LIMIT ?"
        with self._look() as db:
            found = [str(name) for (name,) in db.execute(query, (self.namespace, start, limit))]
        return [name for name in found if name.startswith(start)]

    def _total(self) -> int:
        with self._look() as db:
            return _used(db, self.namespace)

    def _take(self, name: str, owner: str, seconds: float) -> float | None:
        if not self.path.parent.exists():
            self._made(private_directory, self.path.parent)
        return self._leases.take(self.namespace, name, owner, seconds)

    def _let_go(self, name: str, owner: str) -> None:
        self._leases.end(self.namespace, name, owner)

    def removals(self) -> int:
        with self._look() as db:
            return int(db.execute("SELECT n FROM removals").fetchone()[0])

    def _key_texts(self) -> list[str]:
        with self._look() as db:
            return [str(text) for (text,) in db.execute("SELECT text FROM key")]

    def _add_key_text(self, id: str, text: str) -> bool:
        with self._change(make=True) as db:
            return db.execute("INSERT OR IGNORE INTO key VALUES (?, ?)", (id, text)).rowcount == 1

    def _remove_key_text(self, id: str) -> str | None:
        with self._change() as db:
            row = db.execute("SELECT text FROM key WHERE id = ?", (id,)).fetchone()
            db.execute("DELETE FROM key WHERE id = ?", (id,))
        return None if row is None else str(row[0])

    def _count(self, db: sqlite3.Connection, more: int) -> None:
        db.execute(
            "INSERT INTO used VALUES (?, ?) ON CONFLICT (namespace) DO UPDATE SET bytes = bytes + excluded.bytes",
            (self.namespace, more),
        )
        if more > 0:
            self._check_quota(_used(db, self.namespace))

    def _on_a_full_disk_too(self, change: Callable[[sqlite3.Connection], _T]) -> _T:
        """Where a journal beside the file has no room, it is kept in RAM."""
        try:
            with self._opened(write=True) as db:
                return change(db)
        except sqlite3.OperationalError as e:
            if "full" not in str(e) and "disk I/O" not in str(e):
                raise self._fault(e) from None
        with self._change(journal="MEMORY") as db:
            return change(db)

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
        """A connection that changes nothing, but for a file of an older version."""
        try:
            with self._opened(write=False) as db:
                yield db
        except sqlite3.OperationalError as e:
            raise self._fault(e) from None

    @contextlib.contextmanager
    def _opened(self, *, write: bool, make: bool = False, journal: str | None = None) -> Iterator[sqlite3.Connection]:
        """Leaves sqlite3.OperationalError to the caller."""
        if make:
            self._made(self._make)
        there = self.path.exists()  # a store that is not there is an empty one
        if there and not self.path.is_file():  # a device of zeros would be one too
            raise LlamamemError(f"{self.location}: is not a file; give another place")
        place = f"{self.path.as_uri()}?mode=rw" if there else ":memory:"  # one that cannot be written is read
        try:
            with (
                self._turn if write else contextlib.nullcontext(),
                contextlib.closing(
                    sqlite3.connect(place, timeout=_LOCK_TIMEOUT, isolation_level=None, uri=there)
                ) as db,
            ):
                db.text_factory = lambda text: text.decode("utf-8", "replace")  # damage is reported by who reads it
                db.execute("PRAGMA synchronous = FULL")
                db.execute("PRAGMA secure_delete = ON")  # what is forgotten is not left in free pages
                if journal is not None:
                    db.execute(f"PRAGMA journal_mode = {journal}")
                self._check_file(db)
                db.execute("BEGIN IMMEDIATE" if write or not there else "BEGIN")
                with db:  # commits, or rolls back
                    yield db
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError as e:
            raise LlamamemError(f"{self.path}: not a store of sessions, or damaged ({e}); give another file") from None

    def _make(self) -> None:
        if not self.path.exists():
            if not self.path.parent.exists():
                private_directory(self.path.parent)
            self.path.touch(mode=0o600)  # what somebody said may be read out of a memory
        if self.path.stat().st_mode & 0o077:
            self.path.chmod(0o600)

    def _made(self, make: Callable[..., Any], *what: Any) -> None:
        try:
            make(*what)
        except OSError as e:
            raise Unreachable(f"{self.path}: the store cannot be made ({e.strerror}); give another --store") from None

    def _fault(self, error: sqlite3.OperationalError) -> LlamamemError:
        kind = Full if "full" in str(error) else Unreachable
        return kind(
            f"{self.path}: the store cannot be read or changed ({error}); see to the disk, to who may write there and"
            " to who else has it open"
        )

    def _check_file(self, db: sqlite3.Connection) -> None:
        """Makes the tables of a new one, and brings one of an older version on, in a transaction of its own."""
        if _versions(db) == (_APPLICATION, _VERSION):
            return
        db.execute("PRAGMA auto_vacuum = FULL")  # of a new one: what is removed gives its room back to the disk
        db.execute("BEGIN IMMEDIATE")
        with db:
            application, version = _versions(db)
            if application == _APPLICATION and version > _VERSION:
                raise LlamamemError(
                    f"{self.path}: a store of version {version}, this llamamem reads {_VERSION}; update it"
                )
            tables = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            if application != _APPLICATION and tables:
                raise LlamamemError(
                    f"{self.path}: another program's database; give another file as --store sqlite:FILE"
                )
            if version < _VERSION:
                _bring_on(db, version if application == _APPLICATION else 0)
            db.execute(f"PRAGMA application_id = {_APPLICATION}")
            db.execute(f"PRAGMA user_version = {_VERSION}")


def _bring_on(db: sqlite3.Connection, version: int) -> None:
    if version:
        db.execute("ALTER TABLE session RENAME TO older")
    for statement in _SCHEMA:
        db.execute(statement)
    if version:
        before = "before" if version > 1 else "NULL"
        db.execute(f"INSERT INTO session SELECT '', name, metadata, state, NULL, {before}, NULL FROM older")
        db.execute("DROP TABLE older")
        db.execute(f"INSERT INTO used SELECT '', coalesce(sum({_LENGTHS}), 0) FROM session")


def _versions(db: sqlite3.Connection) -> tuple[int, int]:
    application, version = (db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version"))
    return int(application), int(version)


def _used(db: sqlite3.Connection, namespace: str) -> int:
    row = db.execute("SELECT bytes FROM used WHERE namespace = ?", (namespace,)).fetchone()
    return 0 if row is None else int(row[0])


def _text(metadata: bytes) -> str:
    try:
        return metadata.decode()
    except UnicodeDecodeError:
        raise Damaged("its metadata is damaged: it is not text") from None
