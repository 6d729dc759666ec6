"""The SQLite file of sessions: other files in its place, damaged rows, a lock that is held."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from llamamem.errors import LlamamemError
from llamamem.sessions import Memory, SqliteStore, sqlite

MakeMemory = Callable[..., Memory]


@pytest.fixture
def place(tmp_path: Path) -> SqliteStore:
    return SqliteStore(tmp_path / "store.db")


def execute(place: SqliteStore, statement: str, *values: object) -> None:
    with closing(sqlite3.connect(place.path)) as db, db:
        db.execute(statement, values)


DAMAGES = {
    "a flipped byte": ("UPDATE session SET state = X'01' || substr(state, 2) WHERE name = 'alice'", "hash"),
    "no state": ("UPDATE session SET state = NULL WHERE name = 'alice'", "state is missing"),
    "a text for a state": ("UPDATE session SET state = 'text' WHERE name = 'alice'", "hash"),
    "a number for metadata": ("UPDATE session SET metadata = 5 WHERE name = 'alice'", "metadata is damaged"),
    "bytes for metadata": ("UPDATE session SET metadata = CAST(X'FF00' AS TEXT) WHERE name = 'alice'", "damaged"),
    "another's metadata": (
        "UPDATE session SET metadata = (SELECT metadata FROM session WHERE name = 'bob') WHERE name = 'alice'",
        "'bob'",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_listed_and_refused(place: SqliteStore, memory: MakeMemory, damage: str) -> None:
    saved = place.save(place.create("alice"), memory(1, 1))
    place.save(place.create("bob"), memory(2, 2))
    statement, said = DAMAGES[damage]
    execute(place, statement)
    for use in (
        lambda: place.load("alice"),
        lambda: place.save(saved, memory(3, 3)),
        lambda: place.create("alice"),
        lambda: place.create("carol", from_="alice"),
    ):
        with pytest.raises(LlamamemError, match="'alice'") as refused:
            use()
        assert said in str(refused.value) and "llamamem session rm" in str(refused.value)
    entries = place.entries(verify=True)
    assert [(entry.label, bool(entry.fault)) for entry in entries] == [("alice", True), ("bob", False)]
    assert said in str(entries[0].fault)
    assert place.prune(timedelta(days=-1)) == ["bob"]
    place.remove("alice")
    assert place.entries() == []


def test_another_programs_database_is_left_alone(place: SqliteStore) -> None:
    execute(place, "CREATE TABLE session (name TEXT, metadata TEXT, state BLOB)")
    before = place.path.read_bytes()
    for use in (place.entries, lambda: place.create("alice"), lambda: place.remove("alice")):
        with pytest.raises(LlamamemError, match="another program's"):
            use()
    assert place.path.read_bytes() == before


def test_a_later_version_is_refused(place: SqliteStore) -> None:
    place.create("alice")
    execute(place, "PRAGMA user_version = 4")
    with pytest.raises(LlamamemError, match=r"version 4.*update"):
        place.load("alice")


def test_a_file_that_is_no_database_is_refused(place: SqliteStore) -> None:
    place.path.write_bytes(b"GGUF" * 1000)
    for use in (place.entries, lambda: place.create("alice")):
        with pytest.raises(LlamamemError, match=f"{place.path}: not a store"):
            use()
    assert place.path.read_bytes() == b"GGUF" * 1000


def test_a_place_that_is_a_directory_is_refused(tmp_path: Path) -> None:
    place = SqliteStore(tmp_path)
    for use in (place.entries, lambda: place.create("alice")):
        with pytest.raises(LlamamemError, match=f"{tmp_path}"):
            use()


def test_a_lock_that_is_held_on_and_on_is_an_error(
    place: SqliteStore, memory: MakeMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = place.create("alice")
    monkeypatch.setattr(sqlite, "_LOCK_TIMEOUT", 0.1)
    with closing(sqlite3.connect(place.path, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        with pytest.raises(LlamamemError, match="locked"):
            place.save(saved, memory(1, 1))
    assert place.save(saved, memory(1, 1)).generation == 1


def test_only_the_owner_can_read(place: SqliteStore) -> None:
    place.create("alice")
    assert place.path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("version", [1, 2])
def test_a_store_of_an_older_version_goes_on(place: SqliteStore, memory: MakeMemory, version: int) -> None:
    saved = place.save(place.save(place.create("alice"), memory(1, 1)), memory(2, 2))
    place.path.unlink()
    before = ", before BLOB" if version == 2 else ""
    execute(place, f"CREATE TABLE session (name TEXT PRIMARY KEY, metadata TEXT NOT NULL, state BLOB{before})")
    states = (memory(2, 2).data, memory(1, 1).data)[:version]
    row = ("alice", saved.model_dump_json(exclude_defaults=True, exclude={"format"}), *states)
    execute(place, f"INSERT INTO session VALUES ({', '.join('?' * len(row))})", *row)
    execute(place, f"PRAGMA application_id = {0x524D5653}")
    execute(place, f"PRAGMA user_version = {version}")
    assert [entry.fault for entry in place.entries(verify=True)] == [None]
    assert place.total_bytes() == len(memory(1).data) and place.within("k").entries() == []
    if version == 2:
        assert place.undo("alice").tokens == 1
    assert place.save(place.load("alice")[0], memory(3, 3)).before is not None
    assert place.undo("alice").tokens in (1, 2)


class Full(sqlite3.Connection):
    """Has no room for a journal beside the file."""

    def execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
        journal = super().execute("PRAGMA journal_mode").fetchone()[0]
        if statement.split()[0] in ("DELETE", "UPDATE", "INSERT") and journal != "memory":
            raise sqlite3.OperationalError("database or disk is full")
        return super().execute(statement, *values)


def test_on_a_full_disk_what_is_there_can_be_resumed_and_removed(
    place: SqliteStore, memory: MakeMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = place.save(place.create("alice"), memory(1, 1))
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite.sqlite3, "connect", lambda *a, **k: connect(*a, **k, factory=Full))
    loaded, state = place.load("alice")
    assert state == memory(1, 1).data and loaded.used == saved.used
    with pytest.raises(LlamamemError, match="full"):
        place.save(loaded, memory(2, 2))
    place.remove("alice")
    assert place.entries() == []


def test_a_file_that_cannot_be_written_is_read(
    place: SqliteStore, memory: MakeMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.save(place.create("alice"), memory(1, 1))
    connect = sqlite3.connect  # root may write anywhere: as read-only as a file of another user
    monkeypatch.setattr(sqlite.sqlite3, "connect", lambda name, **k: connect(name.replace("mode=rw", "mode=ro"), **k))
    assert [entry.fault for entry in place.entries(verify=True)] == [None]
    assert place.load("alice")[1] == memory(1, 1).data
    with pytest.raises(LlamamemError, match="readonly"):
        place.remove("alice")
