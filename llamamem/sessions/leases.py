"""Leases of a store on this machine: a small SQLite file beside it that nothing is lost with.

It is not flushed: a lease need not outlive the machine. Time is the machine's own since it started, which no clock that
is set changes; what was leased before it started last is free. Names are hashed, so that none stays behind.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from llamamem.sessions.store import Unreachable

_WAIT = 60.0  # seconds; a change takes less than a millisecond
_SCHEMA = "CREATE TABLE IF NOT EXISTS lease (name TEXT PRIMARY KEY, owner TEXT, until REAL, start TEXT) WITHOUT ROWID"


class Leases:
    """Its connection is kept, for whichever thread has the turn, and opened anew where the file is another by now."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._db: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None  # device and inode that it is open on
        # SQLite lets who waits try again by chance: of a thousand threads some never get it
        self._turn = threading.Lock()

    def close(self) -> None:
        with self._turn:
            self._disconnect()

    def take(self, namespace: str, name: str, owner: str, seconds: float) -> float | None:
        """None: it is this owner's now; else for how many seconds it is another's."""
        key, start, at = _key(namespace, name), _start(), time.monotonic()
        with self._opened() as db:
            row = db.execute("SELECT owner, until FROM lease WHERE name = ? AND start = ?", (key, start)).fetchone()
            if row is not None and row[0] != owner and row[1] > at:
                return float(row[1]) - at
            db.execute("DELETE FROM lease WHERE until <= ? OR start != ?", (at, start))
            db.execute("INSERT OR REPLACE INTO lease VALUES (?, ?, ?, ?)", (key, owner, at + seconds, start))
        return None

    def end(self, namespace: str, name: str, owner: str) -> None:
        if self.path.exists():
            with self._opened() as db:
                db.execute("DELETE FROM lease WHERE name = ? AND owner = ?", (_key(namespace, name), owner))

    @contextlib.contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        with self._turn:
            try:
                with self._begun() as db:
                    yield db
            except sqlite3.Error as e:
                self._disconnect()
                raise Unreachable(
                    f"{self.path}: no lease can be taken ({e}); see to the disk and to who may write there"
                ) from None

    def _begun(self) -> sqlite3.Connection:
        """In a transaction, as the only one."""
        for last in (False, True):
            try:
                if self._db is None or self._file != self._there():
                    self._disconnect()
                    self._db = self._connect()
                self._db.execute("BEGIN IMMEDIATE")
                return self._db
            except sqlite3.DatabaseError as e:
                self._disconnect()
                if last or isinstance(e, sqlite3.OperationalError):
                    raise
                for end in ("", "-journal"):  # the machine stopped within a change: no lease is left
                    self.path.with_name(self.path.name + end).unlink(missing_ok=True)
        raise AssertionError

    def _connect(self) -> sqlite3.Connection:
        if not self.path.exists():  # who opens and closes it beside SQLite ends the locks that this process has there
            self.path.touch(mode=0o600)
        self._file = self._there()
        db = sqlite3.connect(self.path, timeout=_WAIT, isolation_level=None, check_same_thread=False)
        try:
            db.execute("PRAGMA synchronous = OFF")
            # not WAL: who opens it at the same time as others is refused, and not made to wait
            db.execute("PRAGMA journal_mode = PERSIST")
            db.execute(_SCHEMA)
        except BaseException:
            db.close()
            raise
        return db

    def _disconnect(self) -> None:
        if self._db is not None:
            self._db.close()
        self._db = self._file = None

    def _there(self) -> tuple[int, int] | None:
        try:
            found = self.path.stat()
        except FileNotFoundError:
            return None
        return found.st_dev, found.st_ino


def _key(namespace: str, name: str) -> str:
    return hashlib.sha256(f"{len(namespace)}:{namespace}{name}".encode()).hexdigest()


@functools.cache
def _start() -> str:
    """Tells this start of the machine from others."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # where there is none, a lease of before may last as long as it was given
        return ""
