"""Sessions: memories of conversations by name, kept outside of the server."""

from __future__ import annotations

from llamamem.errors import LlamamemError
from llamamem.sessions.chat import Chat, ChatMemory
from llamamem.sessions.client import Sessions
from llamamem.sessions.directory import DirectoryStore
from llamamem.sessions.session import Conflict, Entry, Memory, Missing, Session
from llamamem.sessions.sqlite import SqliteStore
from llamamem.sessions.store import Busy, Full, Key, Record, SessionStore, Unreachable
from llamamem.sessions.valkey import public_url

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
    """`DIRECTORY`, `sqlite:FILE` or `sqlite:///FILE`, `valkey://` or `redis://`, `postgresql://`: see docs/stores.md.

    `quota` is in bytes of memories, of each namespace; None: no limit. Nothing is made or asked before it is used.
    """
    scheme = place.partition(":")[0]
    if scheme == "sqlite":
        path = place.removeprefix("sqlite:")
        return SqliteStore(path.removeprefix("//") if path.startswith("///") else path, quota=quota)
    if scheme in ("valkey", "valkeys", "redis", "rediss"):
        from llamamem.sessions.valkey import ValkeyStore

        return ValkeyStore(place, quota=quota)
    if scheme in ("postgresql", "postgres"):
        from llamamem.sessions.postgres import PostgresStore

        return PostgresStore(place, quota=quota)
    if "://" in place:
        raise LlamamemError(
            f"{public_url(place)}: no store is of that kind; give a directory, sqlite:FILE, valkey:// or postgresql://"
        )
    return DirectoryStore(place, quota=quota)
