"""Sessions: memories of conversations by name, kept outside of the server."""

from __future__ import annotations

from llamamem.sessions.chat import Chat, ChatMemory
from llamamem.sessions.client import Sessions
from llamamem.sessions.directory import DirectoryStore
from llamamem.sessions.session import Conflict, Entry, Memory, Missing, Session, SessionStore
from llamamem.sessions.sqlite import SqliteStore

__all__ = [
    "Chat",
    "ChatMemory",
    "Conflict",
    "DirectoryStore",
    "Entry",
    "Memory",
    "Missing",
    "Session",
    "SessionStore",
    "Sessions",
    "SqliteStore",
    "open_store",
]


def open_store(place: str, *, quota: int | None = None) -> SessionStore:
    """`DIRECTORY` or `sqlite:FILE`. `quota` is in bytes of states; None: no limit."""
    if place.startswith("sqlite:"):
        return SqliteStore(place.removeprefix("sqlite:"), quota=quota)
    return DirectoryStore(place, quota=quota)
