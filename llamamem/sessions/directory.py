"""Sessions in a directory: one JSON of metadata, a state file, and that of the generation before.

    <key>.json                     the metadata; <key> is the SHA-256 of the name, whatever characters it has
    <key>-<generation>.state       the memory of that generation, as the server wrote it
    locks/<first two digits>.lock  held for the moment of a change
    locks/quota.lock               likewise, while a quota is counted and used up

A save writes the next state beside the old one. What commits it is the rename of the metadata: a crash before leaves
the old session, a crash after leaves the new one; the state that is too many is swept by the session's next save.
Only what is about all sessions, or removes one, looks through the whole directory, and does so once.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import stat
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import filelock

from llamamem.errors import LlamamemError
from llamamem.formats.private import flush_directory, private_directory, replace_private
from llamamem.formats.regular import read_regular
from llamamem.sessions.session import (
    MISSING,
    WRONG_LENGTH,
    Damaged,
    Entry,
    Generation,
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

_FILE = re.compile(r"(?P<part>\.)?(?P<key>[0-9a-f]{64})(?P<kind>\.json|-(?P<generation>[0-9]+)\.state)(?(part)\.part)")
_KEY = re.compile(r"[0-9a-f]{64}")
_MAX_JSON = 1 << 20  # bytes of metadata, which has some hundred
_LOCK_TIMEOUT = 60.0  # seconds; a change takes milliseconds
_LEFT = 60.0  # seconds, after which a half-written file is one that a killed process left


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
            if any(os.path.lexists(path) for path in (self._json(key), self._state_path(key, session))):
                self._read(key, name)  # raises when it is damaged
                raise taken(name, self.location)
            with self._room_for(len(state or b"")):
                self._write(key, session, state)
        return session

    def load(self, name: str) -> tuple[Session, bytes | None]:
        key = _key(check_name(name))
        with self._reported():
            try:
                with self._locked(key):
                    session, state = self._read(key, name)
                    session = session.model_copy(update={"used": now()})
                    self._write(key, session, None)
                    return session, state
            except filelock.Timeout:
                raise
            except OSError:  # on a full or read-only disk, the time of its use is all that is lost
                return self._read(key, name)

    def save(self, session: Session, memory: Memory) -> Session:
        key = _key(check_name(session.name))
        with self._change(key):
            found, state = self._read(key, session.name)
            saved = next_version(found, session, memory)
            with self._room_for(len(memory.data) - len(state or b"")):
                self._write(key, saved, memory.data)
            self._sweep(key, saved)
        return saved

    def undo(self, name: str) -> Session:
        key = _key(check_name(name))
        with self._change(key):
            found, state = self._read(key, name)
            saved = undone(found, self.location)
            assert found.before is not None
            try:
                before = self._state(key, found.before)
            except Damaged as e:
                raise LlamamemError(
                    f"session {name!r} in {self.location}: generation {found.before.generation} cannot be brought back:"
                    f" {e}; generation {found.generation} stays"
                ) from None
            with self._room_for(len(before or b"") - len(state or b"")):
                self._write(key, saved, before)
            self._sweep(key, saved)
        return saved

    def entries(self, *, after: str | None = None, limit: int | None = None, verify: bool = False) -> list[Entry]:
        begun = None
        if after is not None:
            of_file = self._json(Path(after).stem) == Path(after)  # the label of one without a name
            begun = Path(after).stem if of_file else _key(after)
        with self._reported():
            names = self._listed()
        keys = {name[:64] for name in names if begun is None or name[:64] > begun}
        entries: list[Entry] = []
        for key in sorted(keys):
            if not _KEY.fullmatch(key):
                continue
            if limit is not None and len(entries) >= limit:
                break
            if (entry := self._entry(key, verify)) is not None:
                entries.append(entry)
        return entries if after is not None or limit is not None else sorted(entries, key=lambda entry: entry.label)

    def names(self, start: str, limit: int) -> list[str]:
        found: list[str] = []
        with self._reported():
            keys = {name[:64] for name in self._listed()}
        for key in filter(_KEY.fullmatch, keys):
            with contextlib.suppress(Damaged):
                if len(found) < limit and (name := self._session(key).name).startswith(start):
                    found.append(name)
        return sorted(found)

    def remove(self, name: str) -> None:
        key = _key(check_name(name))
        with self._change(key):
            found = self._found(parts=True)
            if not any(map(_is_whole, found.get(key, []))):
                raise Missing(name, self.location)
            self._remove(found.pop(key))
            self._sweep_parts(found)

    def prune(self, older_than: timedelta) -> list[str]:
        limit = now() - older_than
        removed = []

        def is_old(entry: Entry | None) -> bool:
            return bool(entry and entry.session and entry.fault is None and entry.session.used < limit)

        with self._reported():
            found = self._found(parts=True)
            for key, names in found.items():
                if not any(map(_is_whole, names)) or not is_old(self._look(key, verify=False)):
                    continue
                with self._change(key):
                    entry = self._look(key, verify=True)  # it may have been used by now
                    if entry is not None and is_old(entry):
                        self._remove(names)
                        removed.append(entry.label)
            self._sweep_parts(found)
        return sorted(removed)

    def total_bytes(self) -> int:
        with self._reported():
            newest = (max(names, key=_generation) for names in self._found().values())
            return sum((self.path / name).stat().st_size for name in newest if name.endswith(".state"))

    def _entry(self, key: str, verify: bool) -> Entry | None:
        entry = self._look(key, verify)
        if entry is not None and entry.fault is not None:
            with contextlib.suppress(OSError), self._locked(key):  # not in the middle of a change, if one can wait
                entry = self._look(key, verify)
        return entry

    def _look(self, key: str, verify: bool) -> Entry | None:
        """None: it is gone by now."""
        label, session = str(self._json(key)), None
        try:
            session = self._session(key)
            label = session.name
            if verify:
                self._state(key, session)
            else:
                self._check_length(key, session)
        except Damaged as e:
            if session is None and not self._json(key).exists() and key not in self._found():
                return None
            return Entry(label, session, str(e))
        return Entry(label, session)

    def _read(self, key: str, name: str) -> tuple[Session, bytes | None]:
        try:
            session = self._session(key)
            return session, self._state(key, session)
        except Damaged as e:
            if not os.path.lexists(self._json(key)) and key not in self._found():
                raise Missing(name, self.location) from None
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

    def _state(self, key: str, session: Generation) -> bytes | None:
        state = None
        try:
            if session.state_sha256 is not None:
                state = read_regular(self._state_path(key, session), session.n_bytes)
        except FileNotFoundError:
            pass
        except OSError as e:
            if e.errno == errno.EFBIG:
                raise Damaged(WRONG_LENGTH) from None
            raise Damaged(f"its state cannot be read ({e.strerror})") from None
        check_state(session, state)
        return state

    def _check_length(self, key: str, session: Generation) -> None:
        """What can be seen of a state without reading it."""
        if session.state_sha256 is None:
            return
        try:
            found = self._state_path(key, session).stat()
        except OSError:
            raise Damaged(MISSING) from None
        if not stat.S_ISREG(found.st_mode):
            raise Damaged("its state cannot be read (it is not a file)")
        if found.st_size != session.n_bytes:
            raise Damaged(WRONG_LENGTH)

    def _write(self, key: str, session: Session, state: bytes | None) -> None:
        if state is not None:
            replace_private(self._state_path(key, session), state)
        replace_private(self._json(key), session.model_dump_json(indent=1).encode() + b"\n")

    def _sweep(self, key: str, session: Session) -> None:
        """Removes the state that is no longer kept, and one that a crash kept from that. A failure leaves a file."""
        for number in range(max(0, session.generation - 3), session.generation - 1):
            with contextlib.suppress(OSError):
                (self.path / f"{key}-{number}.state").unlink(missing_ok=True)

    def _sweep_parts(self, found: dict[str, list[str]]) -> None:
        for name in (name for names in found.values() for name in names if not _is_whole(name)):
            path = self.path / name
            with contextlib.suppress(OSError):
                if time.time() - path.lstat().st_mtime > _LEFT:
                    path.unlink()

    def _remove(self, names: list[str]) -> None:
        for name in sorted(names, key=lambda name: name.endswith(".json")):  # last what says whose it was
            (self.path / name).unlink(missing_ok=True)
        flush_directory(self.path)

    def _listed(self) -> list[str]:
        """One look at the whole directory."""
        try:
            return os.listdir(self.path)
        except FileNotFoundError:
            return []

    def _found(self, *, parts: bool = False) -> dict[str, list[str]]:
        """Names of files by key; `parts` adds what a crash left of a file that was being written."""
        found: dict[str, list[str]] = {}
        for match in filter(None, map(_FILE.fullmatch, self._listed())):
            if parts or not match["part"]:
                found.setdefault(match["key"], []).append(match[0])
        return found

    def _json(self, key: str) -> Path:
        return self.path / f"{key}.json"

    def _state_path(self, key: str, session: Generation) -> Path:
        return self.path / f"{key}-{session.generation}.state"

    @contextlib.contextmanager
    def _change(self, key: str, *, make: bool = False) -> Iterator[None]:
        with self._reported():
            if make:
                private_directory(self.path)
            with self._locked(key):
                yield

    @contextlib.contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        # Locks are shared by the sessions whose keys start alike. They are never removed: a lock file that is removed
        # while another process waits for it would be held twice.
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
        folder.mkdir(exist_ok=True, mode=0o700)
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


def _is_whole(name: str) -> bool:
    return not name.startswith(".")


def _generation(name: str) -> int:
    match = _FILE.fullmatch(name)
    return -1 if match is None or match["generation"] is None else int(match["generation"])
