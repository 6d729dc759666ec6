"""Leases of a store on this machine: a small SQLite file beside it that nothing is lost with.

It is not flushed: a lease need not outlive the machine. Time is the machine's own since it started, which no clock that
is set changes; what was leased before it started last is free. Names are hashed, so that none stays behind.
"""

from __future__ import annotations

import contextlib
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
    def __init__(self, path: Path) -> None:
        self.path = path
        self._turn = (
            threading.Lock()
        )  # SQLite lets who waits try again by chance: of a thousand threads some never get it

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
        try:
            with self._turn, contextlib.closing(self._connect()) as db, db:
                yield db
        except sqlite3.Error as e:
            raise Unreachable(
                f"{self.path}: no lease can be taken ({e}); see to the disk and to who may write there"
            ) from None

    def _connect(self) -> sqlite3.Connection:
        for last in (False, True):
            self.path.touch(mode=0o600)
            db = sqlite3.connect(self.path, timeout=_WAIT, isolation_level=None)
            try:
                db.execute("PRAGMA synchronous = OFF")
                db.execute("BEGIN IMMEDIATE")
                db.execute(_SCHEMA)
                return db
            except sqlite3.DatabaseError as e:
                db.close()
                if last or isinstance(e, sqlite3.OperationalError):
                    raise
                self.path.unlink(missing_ok=True)  # the machine stopped within a change: there are no leases any more
        raise AssertionError


def _key(namespace: str, name: str) -> str:
    return hashlib.sha256(f"{len(namespace)}:{namespace}{name}".encode()).hexdigest()


def _start() -> str:
    """Tells this start of the machine from others."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # where there is none, a lease of before may last as long as it was given
        return ""
