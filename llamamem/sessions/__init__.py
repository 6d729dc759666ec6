"""Sessions: memories of conversations by name, kept outside of the server."""

from __future__ import annotations

from llamamem.sessions.chat import Chat, ChatMemory
from llamamem.sessions.client import Sessions
from llamamem.sessions.directory import DirectoryStore
from llamamem.sessions.session import Conflict, Entry, Memory, Missing, Session
from llamamem.sessions.sqlite import SqliteStore
from llamamem.sessions.store import Busy, Full, Key, Record, SessionStore, Unreachable

__all__ = [
    "Busy",
    "Chat",
    "ChatMemory",
    "Conflict",
    "DirectoryStore",
    "Entry",
    "Full",
    "Key",
    "Memory",
    "Missing",
    "Record",
    "Session",
    "SessionStore",
    "Sessions",
    "SqliteStore",
    "Unreachable",
    "open_store",
]


def open_store(place: str, *, quota: int | None = None) -> SessionStore:
    """`DIRECTORY` or `sqlite:FILE`. `quota` is in bytes of states; None: no limit."""
    if place.startswith("sqlite:"):
        return SqliteStore(place.removeprefix("sqlite:"), quota=quota)  # type: ignore[return-value]
    return DirectoryStore(place, quota=quota)  # type: ignore[return-value]
