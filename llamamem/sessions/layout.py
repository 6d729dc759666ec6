"""How a directory of sessions is laid out; older versions had all files in one folder, which are moved."""

from __future__ import annotations

import functools
import hashlib
import os
import re
from pathlib import Path

import filelock

from llamamem.formats.private import flush_directory, private_directory
from llamamem.sessions.store import Unreachable

SESSIONS = "sessions"
_PART = ".sessions.part"
_seen: set[Path] = set()  # stores in which this process has found sessions

_OLD = re.compile(r"\.?(?P<key>[0-9a-f]{64})(\.json|-[0-9]+\.state)(\.part)?")


def namespace_key(namespace: str) -> str:
    return hashlib.sha256(namespace.encode()).hexdigest()[:32]


@functools.lru_cache(maxsize=4096)
def place(root: Path, namespace: str) -> str:
    """The folder with the sessions of a namespace."""
    return f"{root}/{SESSIONS}/{namespace_key(namespace)}"


def check(root: Path) -> None:
    """Sees that a store of an older version is moved before it is used, and that one that goes away is not begun anew.
    It takes one look where there is nothing to do."""
    had = root in _seen  # another thread may begin it from here on
    if os.path.exists(f"{root}/{SESSIONS}"):
        _seen.add(root)
        return
    names = os.listdir(root) if root.is_dir() else []
    if _PART not in names and not any(map(_OLD.fullmatch, names)):
        if had:
            raise Unreachable(
                f"{root}: had sessions, and is empty or gone; see to the disk, or start anew without them"
            )
        return
    try:
        with filelock.FileLock(_lock(root), timeout=600):
            if not (root / SESSIONS).exists():
                _move(root)
    except OSError as e:
        raise Unreachable(
            f"{root}: sessions of an older llamamem, which are moved into folders by their first use, and cannot be"
            f" ({e.strerror or e}); see to the disk and to who may write there"
        ) from None


def _lock(root: Path) -> Path:
    (root / "locks").mkdir(exist_ok=True, mode=0o700)
    return root / "locks" / "layout.lock"


def _move(root: Path) -> None:
    """Moves file by file into a folder that gets its name when all is there: one that was killed is gone on with."""
    new = root / _PART
    place = new / namespace_key("")
    private_directory(place)
    folders = set()
    for match in filter(None, map(_OLD.fullmatch, os.listdir(root))):
        folder = place / match["key"][:2]
        if folder not in folders:
            private_directory(folder)
            folders.add(folder)
        os.replace(root / match[0], folder / match[0])
    for path in (*folders, place, new, root):
        flush_directory(path)
    os.replace(new, root / SESSIONS)
    flush_directory(root)
