"""A slot of a server, while one process of this user is at it."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator

import filelock

from llamamem.errors import LlamamemError
from llamamem.formats.private import private_directory
from llamamem.formats.run import state_dir


@contextlib.contextmanager
def held(server: str, slot: int, wait: float) -> Iterator[None]:
    """Keeps other processes of this user away; `wait` is in seconds. Raises LlamamemError when one stays at it."""
    directory = state_dir() / "resumed"
    private_directory(directory)
    # shared by the slots whose names hash alike, so that there are few, and none need ever be removed
    lock = directory / f"{slot_key(server, slot)[:2]}.lock"
    try:
        with filelock.FileLock(lock, timeout=wait):
            yield
    except filelock.Timeout:
        raise LlamamemError(f"slot {slot}: another process was at it for {wait:g} s; take another slot") from None


def slot_key(server: str, slot: int) -> str:
    """A name for files about it; `server` is its URL."""
    return hashlib.sha256(f"{server.rstrip('/')} {slot}".encode()).hexdigest()
