"""Sessions in a directory: one JSON of metadata, a state file, that of the generation before, and their origins.

    sessions/<namespace>/<first two digits>/    <namespace> is the SHA-256 of it, in part
        <key>.json                     the metadata; <key> is the SHA-256 of the name, whatever characters it has
        <key>-<generation>.state       the memory of that generation, as the server wrote it
        <key>-<generation>.origin      the memory on which the conversation began that was open then
    locks/<first two digits>.lock      held for the moment of a change
    locks/quota.lock                   likewise, while a quota is counted and used up
    locks/leases                       who is at which session
    keys/<id>.json                     keys of the API
    removals                           as many bytes as sessions were removed

A save writes the next state beside the old one. What commits it is the rename of the metadata: a crash before leaves
the old session, a crash after leaves the new one; the state that is too many is swept by the session's next save. The
folder is flushed once, at the end: file systems with a journal keep the order in which names are changed in a folder.

What is about one session or one page looks through one of the 256 folders or a few, never through all sessions. A
session is read without a lock: its memories are of one version of its metadata, and stay when that is replaced.
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

from llamamem.formats.private import flush_directory, private_directory, replace_private
from llamamem.formats.regular import read_regular
from llamamem.sessions import layout
from llamamem.sessions.leases import Leases
from llamamem.sessions.rows import Memories, Row, Rows, check_lengths
from llamamem.sessions.session import MISSING, WRONG_LENGTH, Damaged, Entry, Generation, Session, read_session
from llamamem.sessions.store import Full, Unreachable

_FILE = re.compile(r"(?P<part>\.)?(?P<key>[0-9a-f]{64})(\.json|-(?P<generation>[0-9]+)\.(state|origin))(?(part)\.part)")
_FOLDER = re.compile(r"[0-9a-f]{2}")
_MAX_JSON = 1 << 20  # bytes of metadata, which has some hundred
_LOCK_TIMEOUT = 60.0  # seconds; a change takes milliseconds
_LOCK_POLL = 0.005  # likewise
_LEFT = 60.0  # seconds, after which a half-written file is one that a killed process left
_SETTLED = 0.1  # seconds, after which a folder that changes has another time of change


class DirectoryStore(Rows):
    """`DirectoryStore("~/sessions", quota=10_000_000)`; the directory is made with the first session.

    It is for the processes of one machine. Nothing that was acknowledged is lost when processes die, nor when the
    machine does: files and folders are flushed before a change returns. Page by page it costs as much with 100,000
    sessions as with few.
    """

    def __init__(self, path: str | Path, *, quota: int | None = None) -> None:
        self.path = Path(path).expanduser().absolute()
        self.quota = quota
        self._leases = Leases(self.path / "locks" / "leases")
        self._totals: dict[str, tuple[int, int]] = {}  # of a folder: when it was changed last, bytes of its states

    @property
    def location(self) -> str:
        return str(self.path)

    def close(self) -> None:
        self._leases.close()

    @property
    def _place(self) -> str:
        return layout.place(self.path, self.namespace)

    def _get(self, name: str, *, before: bool = False) -> Row | None:
        key = _key(name)
        with self._reported():
            layout.check(self.path)
            with contextlib.suppress(Damaged):
                seen = self._stamp(key)
                row = self._read(key, before)
                if self._stamp(key) == seen:
                    return row
            try:
                with self._locked(key):  # not in the middle of a change
                    return self._read(key, before)
            except filelock.Timeout:
                raise
            except OSError:  # on a read-only disk
                return self._read(key, before)

    def _read(self, key: str, before: bool) -> Row | None:
        try:
            text, session = self._metadata(key)
            memories = self._memories(key, session)
        except Damaged:
            if not os.path.lexists(self._json(key)) and not self._files(key):
                return None
            raise
        if not before or session.before is None:
            return Row(text, memories)
        return Row(text, memories, self._memories(key, session.before))

    def _put(self, name: str, expected: str | None, session: Session, memories: Memories | None, more: int) -> bool:
        key = _key(name)
        text = session.model_dump_json(indent=1) + "\n"
        with self._reported():
            if expected is None:
                layout.check(self.path)
                private_directory(self.path)
            with self._locked(key):
                if not self._is(key, expected, session):
                    return self._is(key, text, session)
                folder = self._folder(key)
                if not os.path.isdir(folder):
                    _private_folders(Path(folder), self.path)
                with self._room_for(more):
                    if memories is not None:
                        for data, kind in zip(memories, ("state", "origin"), strict=True):
                            if data is not None and not self._link(key, session, kind):
                                file = self._memory(key, session.generation, kind)
                                replace_private(file, data, flush_folder=False)
                    replace_private(self._json(key), text.encode())
                if memories is not None:
                    self._sweep(key, session)
        return True

    def _is(self, key: str, expected: str | None, session: Session) -> bool:
        if expected is None:
            first = self._memory(key, 0, "state")  # half a copy of another
            return not (os.path.lexists(self._json(key)) or (session.generation == 0 and os.path.lexists(first)))
        try:
            return read_regular(self._json(key), _MAX_JSON) == expected.encode()
        except OSError:
            return False

    def _link(self, key: str, session: Session, kind: str) -> bool:
        """A memory that the generation before has, too, as the origin of most turns is, need not be written again."""
        before, wanted = session.before, session.state_sha256 if kind == "state" else session.origin_sha256
        if before is None or wanted not in (before.state_sha256, before.origin_sha256):
            return False
        known = "state" if wanted == before.state_sha256 else "origin"
        source, target = (self._memory(key, *of) for of in ((before.generation, known), (session.generation, kind)))
        try:
            os.link(source, target, follow_symlinks=False)
        except OSError:  # a disk without links, or what a crash left
            return False
        return True

    def _delete(self, name: str, expected: str | None) -> bool:
        key = _key(name)
        with self._reported(), self._locked(key):
            if expected is not None and self._metadata(key)[0] != expected:
                return False
            found = self._files(key, parts=True)
            if all(file.startswith(".") for file in found):
                return False
            folder = Path(self._folder(key))
            for file in sorted(found, key=lambda file: file.endswith(".json")):  # last what says whose it was
                (folder / file).unlink(missing_ok=True)
            self._sweep_parts(folder)
            flush_directory(folder)
            fd = os.open(self.path / "removals", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            with os.fdopen(fd, "wb") as count:
                count.write(b"\n")
        return True

    def _page(self, after: str, limit: int) -> list[Entry]:
        begun = Path(after).stem if after.endswith(".json") and self._json(Path(after).stem) == after else ""
        begun = begun or (_key(after) if after else "")
        entries: list[Entry] = []
        with self._reported():
            for key in self._keys_after(begun):
                if (entry := self._entry(key)) is not None:
                    entries.append(entry)
                if len(entries) >= limit:
                    break
        return entries

    def _names(self, start: str, limit: int) -> list[str]:
        found: list[str] = []
        with self._reported():
            for key in self._keys_after(""):
                with contextlib.suppress(Damaged):
                    if (name := self._metadata(key)[1].name).startswith(start):
                        found.append(name)
                if len(found) >= limit:
                    break
        return sorted(found)

    def _total(self) -> int:
        with self._reported():
            return sum(self._folder_total(folder) for folder in self._folders(""))

    def _folder_total(self, folder: Path) -> int:
        """Bytes of the newest memories in it; it is counted anew if it was changed since."""
        changed = folder.stat().st_mtime_ns
        counted = self._totals.get(str(folder))
        if counted is not None and counted[0] == changed:
            return counted[1]
        newest: dict[str, tuple[int, int]] = {}
        with os.scandir(folder) as found:
            for file in found:
                match = _FILE.fullmatch(file.name)
                if match is None or match["generation"] is None or match["part"]:
                    continue
                try:
                    generation, size = int(match["generation"]), file.stat().st_size
                except FileNotFoundError:  # replaced by now
                    continue
                known, total = newest.get(match["key"], (-1, 0))
                if generation >= known:
                    newest[match["key"]] = generation, size + (total if generation == known else 0)
        total = sum(size for _, size in newest.values())
        if time.time_ns() - changed > _SETTLED * 1e9:  # of two changes at once the second might not be seen
            self._totals[str(folder)] = changed, total
        return total

    def prune(self, older_than: timedelta) -> list[str]:
        removed = super().prune(older_than)
        with self._reported():
            for folder in self._folders(""):
                self._sweep_parts(folder)
        return removed

    def _take(self, name: str, owner: str, seconds: float) -> float | None:
        if not os.path.isdir(f"{self.path}/locks"):
            with self._reported():
                layout.check(self.path)
                private_directory(self.path)
                self._lock_folder()
        return self._leases.take(self.namespace, name, owner, seconds)

    def _let_go(self, name: str, owner: str) -> None:
        self._leases.end(self.namespace, name, owner)

    def removals(self) -> int:
        with self._reported():
            layout.check(self.path)
            if not self.path.exists():
                return 0
            os.listdir(self.path / "keys" if (self.path / "keys").exists() else self.path)
            with contextlib.suppress(FileNotFoundError):
                return (self.path / "removals").stat().st_size
        return 0

    def _key_texts(self) -> list[str]:
        with self._reported():
            folder = self.path / "keys"
            files = sorted(folder.glob("*.json")) if folder.exists() else []
            return [read_regular(path, _MAX_JSON).decode("utf-8", "replace") for path in files]

    def _add_key_text(self, id: str, text: str) -> bool:
        with self._reported():
            private_directory(self.path)
            private_directory(self.path / "keys")
            with self._lock("keys"):
                if (self.path / "keys" / f"{id}.json").exists():
                    return False
                replace_private(self.path / "keys" / f"{id}.json", text.encode() + b"\n")
        return True

    def _remove_key_text(self, id: str) -> str | None:
        path = self.path / "keys" / f"{id}.json"
        with self._reported():
            if not re.fullmatch("[0-9a-f]+", id) or not path.exists():
                return None
            with self._lock("keys"):
                text = read_regular(path, _MAX_JSON).decode("utf-8", "replace")
                path.unlink()
                flush_directory(path.parent)
                return text

    def _entry(self, key: str) -> Entry | None:
        entry = self._look(key)
        if entry is not None and entry.fault is not None:
            with contextlib.suppress(OSError), self._locked(key):  # not in the middle of a change, if one can wait
                entry = self._look(key)
        return entry

    def _look(self, key: str) -> Entry | None:
        """None: it is gone by now."""
        label, session = self._json(key), None
        try:
            session = self._metadata(key)[1]
            check_lengths(session, self._length(key, session, "state"), self._length(key, session, "origin"))
            return Entry(session.name, session)
        except Damaged as e:
            if session is None and not os.path.exists(self._json(key)) and not self._files(key):
                return None
            return Entry(label if session is None else session.name, session, str(e))

    def _metadata(self, key: str) -> tuple[str, Session]:
        try:
            text = read_regular(self._json(key), _MAX_JSON)
            session = read_session(text)
        except FileNotFoundError:
            raise Damaged("it is half-written or half-removed: its metadata is missing") from None
        except OSError as e:
            raise Damaged(f"its metadata cannot be read ({e.strerror})") from None
        if _key(session.name) != key:
            raise Damaged(f"its metadata is that of {session.name!r}")
        return text.decode(), session

    def _memories(self, key: str, generation: Generation) -> Memories:
        state = origin = None
        try:
            if generation.state_sha256 is not None:
                state = read_regular(self._memory(key, generation.generation, "state"), generation.n_bytes)
            if generation.origin_sha256 is not None:
                origin = read_regular(self._memory(key, generation.generation, "origin"), generation.origin_bytes)
        except FileNotFoundError:
            pass
        except OSError as e:
            if e.errno == errno.EFBIG:
                raise Damaged(WRONG_LENGTH) from None
            raise Damaged(f"its state cannot be read ({e.strerror})") from None
        return state, origin

    def _length(self, key: str, session: Session, kind: str) -> int | None:
        if (session.state_sha256 if kind == "state" else session.origin_sha256) is None:
            return None
        try:
            found = os.stat(self._memory(key, session.generation, kind))
        except OSError:
            raise Damaged(MISSING) from None
        if not stat.S_ISREG(found.st_mode):
            raise Damaged("its state cannot be read (it is not a file)")
        return found.st_size

    def _sweep(self, key: str, session: Session) -> None:
        """Removes the state that is no longer kept, and one that a crash kept from that. A failure leaves a file."""
        for number in range(max(0, session.generation - 3), session.generation - 1):
            for kind in ("state", "origin"):
                with contextlib.suppress(OSError):
                    os.unlink(self._memory(key, number, kind))

    def _sweep_parts(self, folder: Path) -> None:
        """What killed processes left of files that they were writing."""
        for match in filter(None, map(_FILE.fullmatch, os.listdir(folder))):
            if match["part"]:
                with contextlib.suppress(OSError):
                    if time.time() - (folder / match[0]).lstat().st_mtime > _LEFT:
                        (folder / match[0]).unlink()

    def _folders(self, start: str) -> Iterator[Path]:
        layout.check(self.path)
        with contextlib.suppress(FileNotFoundError):
            for name in sorted(os.listdir(self._place)):
                if _FOLDER.fullmatch(name) and name >= start:
                    yield Path(self._place, name)

    def _keys_after(self, after: str) -> Iterator[str]:
        for folder in self._folders(after[:2]):
            matches = filter(None, map(_FILE.fullmatch, os.listdir(folder)))
            keys = {match["key"] for match in matches if not match["part"]}
            yield from sorted(key for key in keys if key > after and key[:2] == folder.name)

    def _files(self, key: str, *, parts: bool = False) -> list[str]:
        with contextlib.suppress(FileNotFoundError):
            matches = filter(None, map(_FILE.fullmatch, os.listdir(self._folder(key))))
            return [match[0] for match in matches if match["key"] == key and (parts or not match["part"])]
        return []

    # paths are text: making those of pathlib takes about as long as using them, and a turn makes some eighty

    def _folder(self, key: str) -> str:
        return f"{self._place}/{key[:2]}"

    def _json(self, key: str) -> str:
        return f"{self._place}/{key[:2]}/{key}.json"

    def _memory(self, key: str, generation: int, kind: str) -> str:
        return f"{self._place}/{key[:2]}/{key}-{generation}.{kind}"

    def _stamp(self, key: str) -> tuple[int, int] | None:
        """Tells one version of the metadata from others."""
        try:
            found = os.stat(self._json(key))
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns

    @contextlib.contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        # Locks are shared by the sessions whose keys start alike. They are never removed: a lock file that is removed
        # while another process waits for it would be held twice.
        layout.check(self.path)
        with self._lock(key[:2]) if os.path.exists(self.path) else contextlib.nullcontext():
            yield

    @contextlib.contextmanager
    def _room_for(self, more: int) -> Iterator[None]:
        if self.quota is None or more <= 0:
            yield
            return
        with self._lock("quota"):
            self._check_quota(self._total() + more)
            yield

    def _lock_folder(self) -> Path:
        folder = self.path / "locks"
        folder.mkdir(exist_ok=True, mode=0o700)
        return folder

    def _lock(self, name: str) -> filelock.BaseFileLock:
        if not os.path.isdir(f"{self.path}/locks"):
            self._lock_folder()
        return filelock.FileLock(f"{self.path}/locks/{name}.lock", timeout=_LOCK_TIMEOUT, poll_interval=_LOCK_POLL)

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except filelock.Timeout as e:
            raise Unreachable(
                f"{e.lock_file}: held by another process for {_LOCK_TIMEOUT:g} s; end that process, or try again"
            ) from None
        except OSError as e:
            kind = Full if e.errno in (errno.ENOSPC, errno.EDQUOT) else Unreachable
            raise kind(
                f"{e.filename or self.path}: the store cannot be read or changed ({e.strerror or e}); see to the disk"
                " and to who may write there"
            ) from None


def _private_folders(folder: Path, root: Path) -> None:
    for path in reversed([folder, *folder.parents]):
        if root in path.parents and not path.exists():
            private_directory(path)
            flush_directory(path.parent)


def _key(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()
