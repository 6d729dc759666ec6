"""Sessions in a directory: one JSON of metadata and one state file each.

    <key>.json                     the metadata; <key> is the SHA-256 of the name, whatever characters it has
    <key>-<generation>.state       the memory of that generation, as the server wrote it
    locks/<first two digits>.lock  held for the moment of a change
    locks/quota.lock               likewise, while a quota is counted and used up

A save writes the next state beside the old one. What commits it is the rename of the metadata: a crash before leaves
the old session, a crash after leaves the new one; the state that is too many is swept by the session's next save.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import filelock

from llamamem.errors import LlamamemError
from llamamem.formats.regular import read_regular
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

_FILE = re.compile(r"(?P<part>\.)?(?P<key>[0-9a-f]{64})(?P<kind>\.json|-[0-9]+\.state)(?(part)\.part)")
_MAX_JSON = 1 << 20  # bytes of metadata, which has some hundred
_LOCK_TIMEOUT = 60.0  # seconds; a change takes milliseconds


class DirectoryStore:
    """`DirectoryStore("~/sessions", quota=10_000_000)`; the directory is made with the first session."""

    def __init__(self, path: str | Path, *, quota: int | None = None) -> None:
        self.path = Path(path).expanduser().absolute()
        self.quota = quota

    @property
    def location(self) -> str:
        return str(self.path)

    def create(self, name: str, from_: str | None = None) -> Session:
        key = _key(check_name(name))
        source, state = self.load(from_) if from_ is not None else (None, None)
        session = new_session(name, source)
        with self._change(key, make=True):
            if self._files(key):
                self._read(key, name)  # raises when it is damaged
                raise taken(name, self.location)
            with self._room_for(len(state or b"")):
                self._write(key, session, state)
        return session

    def load(self, name: str) -> tuple[Session, bytes | None]:
        key = _key(check_name(name))
        with self._change(key):
            session, state = self._read(key, name)
            session = session.model_copy(update={"used": now()})
            self._write(key, session, None)
        return session, state

    def save(self, session: Session, memory: Memory) -> Session:
        key = _key(check_name(session.name))
        with self._change(key):
            found, state = self._read(key, session.name)
            saved = next_version(found, session, memory)
            with self._room_for(len(memory.data) - len(state or b"")):
                self._write(key, saved, memory.data)
            self._sweep(key, saved)
        return saved

    def entries(self) -> list[Entry]:
        return sorted((entry for _, entry in self._each()), key=lambda entry: entry.label)

    def remove(self, name: str) -> None:
        key = _key(check_name(name))
        with self._change(key):
            if not self._files(key):
                raise Missing(name, self.location)
            self._remove(key)

    def prune(self, older_than: timedelta) -> list[str]:
        limit = now() - older_than
        removed = []
        with self._reported():
            for key, entry in self._each():
                if entry.session and entry.fault is None and entry.session.used < limit:
                    self._remove(key)
                    removed.append(entry.label)
        return sorted(removed)

    def total_bytes(self) -> int:
        with self._reported():
            return sum(path.stat().st_size for path in self._files() if path.suffix == ".state")

    def _each(self) -> Iterator[tuple[str, Entry]]:
        """The sessions one by one, each locked while the caller has it."""
        with self._reported():
            keys = {path.name[:64] for path in self._files()}
        for key in keys:
            with self._change(key):
                if self._files(key):  # it may be gone by now
                    yield key, self._entry(key)

    def _entry(self, key: str) -> Entry:
        label, session = str(self._json(key)), None
        try:
            session = self._session(key)
            label = session.name
            self._state(key, session)
        except Damaged as e:
            return Entry(label, session, str(e))
        return Entry(label, session)

    def _read(self, key: str, name: str) -> tuple[Session, bytes | None]:
        if not self._files(key):
            raise Missing(name, self.location)
        try:
            session = self._session(key)
            return session, self._state(key, session)
        except Damaged as e:
            raise damaged(name, self.location, e) from None

    def _session(self, key: str) -> Session:
        try:
            session = read_session(read_regular(self._json(key), _MAX_JSON))
        except FileNotFoundError:
            raise Damaged("it is half-written or half-removed: its metadata is missing") from None
        except OSError as e:
            raise Damaged(f"its metadata cannot be read ({e.strerror})") from None
        if _key(session.name) != key:
            raise Damaged(f"its metadata is that of {session.name!r}")
        return session

    def _state(self, key: str, session: Session) -> bytes | None:
        state = None
        try:
            if session.state_sha256 is not None:
                state = read_regular(self._state_path(key, session), session.n_bytes)
        except FileNotFoundError:
            pass
        except OSError as e:
            raise Damaged(f"its state cannot be read ({e.strerror})") from None
        check_state(session, state)
        return state

    def _write(self, key: str, session: Session, state: bytes | None) -> None:
        if state is not None:
            _replace(self._state_path(key, session), state)
        _replace(self._json(key), session.model_dump_json(indent=1).encode() + b"\n")

    def _sweep(self, key: str, session: Session) -> None:
        """Removes what is not of this version. A failure leaves a file for the next change."""
        for path in set(self._files(key, parts=True)) - {self._json(key), self._state_path(key, session)}:
            with contextlib.suppress(OSError):
                path.unlink()

    def _remove(self, key: str) -> None:
        for path in self._files(key, parts=True):  # the metadata first: without it nothing can be resumed
            path.unlink(missing_ok=True)
        _flush_directory(self.path)

    def _files(self, key: str = "", *, parts: bool = False) -> list[Path]:
        """Of one session or of all, metadata first; `parts` adds what a crash left of a file that was being written."""
        try:
            names = [_FILE.fullmatch(name) for name in os.listdir(self.path)]
        except FileNotFoundError:
            return []
        found = [m for m in names if m and m["key"].startswith(key) and (parts or not m["part"])]
        return [self.path / m[0] for m in sorted(found, key=lambda m: (m["kind"] != ".json", m[0]))]

    def _json(self, key: str) -> Path:
        return self.path / f"{key}.json"

    def _state_path(self, key: str, session: Session) -> Path:
        return self.path / f"{key}-{session.generation}.state"

    @contextlib.contextmanager
    def _change(self, key: str, *, make: bool = False) -> Iterator[None]:
        # Locks are shared by the sessions whose keys start alike. They are never removed: a lock file that is removed
        # while another process waits for it would be held twice.
        with self._reported():
            if make:
                self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            with self._lock(key[:2]) if self.path.exists() else contextlib.nullcontext():
                yield

    @contextlib.contextmanager
    def _room_for(self, more: int) -> Iterator[None]:
        if self.quota is None or more <= 0:
            yield
            return
        with self._lock("quota"):
            check_quota(self.location, self.quota, self.total_bytes() + more)
            yield

    def _lock(self, name: str) -> filelock.BaseFileLock:
        folder = self.path / "locks"
        folder.mkdir(exist_ok=True)
        return filelock.FileLock(folder / f"{name}.lock", timeout=_LOCK_TIMEOUT)

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except filelock.Timeout as e:
            raise LlamamemError(
                f"{e.lock_file}: held by another process for {_LOCK_TIMEOUT:g} s; end that process, or try again"
            ) from None
        except OSError as e:
            raise LlamamemError(
                f"{e.filename or self.path}: the store cannot be read or changed ({e.strerror or e}); see to the disk"
                " and to who may write there"
            ) from None


def _key(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def _replace(path: Path, data: bytes) -> None:
    """Readable by the owner alone: what somebody said may be read out of a memory."""
    part = path.with_name(f".{path.name}.part")
    try:
        fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink()
        raise
    _flush_directory(path.parent)


def _flush_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
