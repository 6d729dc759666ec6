"""What every kind of store promises."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import pytest

from llamamem.errors import LlamamemError
from llamamem.sessions import Conflict, DirectoryStore, Memory, SessionStore, SqliteStore, open_store, rows, session
from llamamem.sessions.postgres import PostgresStore
from llamamem.sessions.session import now
from llamamem.sessions.valkey import ValkeyStore

MakeStore = Callable[..., SessionStore]
MakeMemory = Callable[..., Memory]

HERE = Path(__file__).parent
NAMES = [
    "alice",
    "Alice",
    "caf\u00e9",
    "cafe\u0301",
    "../../etc/passwd",
    "a/b\\c:*?\"<>|'%",
    "-rf",
    ".",
    "..",
    " padded ",
    "\u8a18\u61b6 \U0001f9e0",
    "[red]markup[/]",
    "x" * 200,
    "\U0001f9e0" * 200,
    "'; DROP TABLE session; --",
]


def held(store: SessionStore) -> bytes:
    """All that a server holds of its sessions."""
    if isinstance(store, ValkeyStore):
        client = store._client
        return b"".join(key + (client.dump(key) or b"") for key in client.keys("*"))
    if isinstance(store, PostgresStore):
        query = "SELECT query_to_xml('SELECT * FROM ' || tablename, true, false, '')::text FROM pg_tables"
        found = store._do(lambda db: db.execute(f"{query} WHERE tablename LIKE 'llamamem_%'").fetchall())
        return "".join(text for (text,) in found).encode()
    return b""


def names(store: SessionStore) -> list[str]:
    return [entry.label for entry in store.entries()]


def test_a_session_begins_without_a_memory(store: SessionStore) -> None:
    made = store.create("alice")
    assert (made.name, made.generation, made.tokens, made.state_sha256, made.parent) == ("alice", 0, 0, None, None)
    loaded, state = store.load("alice")
    assert state is None and loaded.created == made.created and loaded.used >= made.used
    assert made.created.utcoffset() == timedelta(0)


def test_what_is_saved_is_loaded(store: SessionStore, make_store: MakeStore, memory: MakeMemory) -> None:
    saved = store.save(store.create("alice"), memory(7, 1))
    assert (saved.generation, saved.tokens, saved.n_bytes) == (1, 7, len(memory(7, 1).data))
    saved = store.save(saved, memory(9, 2))
    loaded, state = make_store().load("alice")  # another process would open it like this
    assert state == memory(9, 2).data
    assert loaded.model_dump(exclude={"used"}) == saved.model_dump(exclude={"used"})
    assert loaded.sidecar_sha256 == "5c" * 32 and loaded.base_sha256 == "ba" * 32 and loaded.generation == 2


def test_metadata_has_utc_times_in_iso_form(store: SessionStore) -> None:
    written = json.loads(store.create("alice").model_dump_json())
    assert written["created"].endswith("Z") and written["used"].endswith("Z")
    assert written["format"] == "llamamem_session.v1"


def test_odd_names_are_kept_apart_and_as_they_are(store: SessionStore, memory: MakeMemory, tmp_path: Path) -> None:
    for i, name in enumerate(NAMES):
        store.save(store.create(name), memory(i + 1, i))
    assert names(store) == sorted(NAMES)
    for i, name in enumerate(NAMES):
        loaded, state = store.load(name)
        assert loaded.name == name and state == memory(i + 1, i).data
    assert {path.name for path in tmp_path.iterdir()} <= {"store", "store.db", "xdg_state_home", "xdg_data_home"}
    for name in NAMES:
        store.remove(name)
    assert names(store) == []


@pytest.mark.parametrize("name", ["", "   ", "x" * 201, "two\nlines", "nul\0", "\x1b[31m", "right\u202eleft", "\ud800"])
def test_other_names_are_refused(store: SessionStore, name: str) -> None:
    for use in (store.create, store.load, store.remove):
        with pytest.raises(LlamamemError) as refused:
            use(name)
        assert "name" in str(refused.value) and str(refused.value).isprintable() and len(str(refused.value)) < 200
    assert names(store) == []


def test_a_copy_starts_with_the_memory_of_another(store: SessionStore, memory: MakeMemory) -> None:
    prefix = store.save(store.create("prefix"), memory(100, 5))
    copy = store.create("alice", from_="prefix")
    assert (copy.parent, copy.generation, copy.tokens, copy.sidecar_sha256) == ("prefix", 0, 100, "5c" * 32)
    assert copy.created >= prefix.used
    assert store.load("alice")[1] == memory(100, 5).data
    store.save(copy, memory(120, 6))
    assert store.load("prefix")[1] == memory(100, 5).data, "the copy is of its own"
    store.remove("prefix")
    assert store.load("alice")[1] == memory(120, 6).data


def test_a_copy_of_nothing_has_no_memory_either(store: SessionStore) -> None:
    store.create("prefix")
    assert store.create("alice", from_="prefix").parent == "prefix"
    assert store.load("alice")[1] is None


def test_a_name_is_given_once(store: SessionStore, memory: MakeMemory) -> None:
    store.save(store.create("alice"), memory(7))
    with pytest.raises(LlamamemError, match=r"'alice'.*already") as refused:
        store.create("alice")
    assert refused.value.exit_status == 2
    assert store.load("alice")[1] == memory(7).data


def test_what_is_not_there_is_refused_by_name(store: SessionStore, memory: MakeMemory) -> None:
    gone = store.create("alice")
    store.create("bob")
    store.remove("alice")
    for use in (
        lambda: store.load("alice"),
        lambda: store.remove("alice"),
        lambda: store.save(gone, memory(1)),
        lambda: store.create("carol", from_="alice"),
    ):
        with pytest.raises(LlamamemError, match=r"'alice'.*llamamem session start"):
            use()
    assert names(store) == ["bob"]


def test_reading_makes_no_store(store: SessionStore, tmp_path: Path) -> None:
    assert store.entries() == [] and store.total_bytes() == 0 and store.prune(timedelta(0)) == []
    for use in (store.load, store.remove):
        with pytest.raises(LlamamemError, match="not in"):
            use("alice")
    assert [path for path in tmp_path.iterdir() if path.name.startswith("store")] == []


def test_the_second_of_two_writers_is_told(store: SessionStore, memory: MakeMemory) -> None:
    store.create("alice")
    mine, theirs = store.load("alice")[0], store.load("alice")[0]
    store.save(theirs, memory(5, 5))
    with pytest.raises(Conflict, match=r"'alice'.*generation 1 over 0.*nothing was saved") as told:
        store.save(mine, memory(6, 6))
    assert told.value.exit_status == 1
    assert store.load("alice")[1] == memory(5, 5).data


def test_a_session_made_again_is_another_one(store: SessionStore, memory: MakeMemory) -> None:
    old = store.create("alice")
    store.remove("alice")
    store.create("alice")
    with pytest.raises(Conflict, match="removed and made again"):
        store.save(old, memory(1))
    assert store.load("alice")[1] is None


WRITER = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from fake_memory_server import make_memory
from llamamem.sessions import Conflict, open_store
place, me, go = sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])
store = open_store(place)
loaded = [store.load(f"s{i}")[0] for i in range(20)]
print("ready", flush=True)
while not go.exists():
    pass
for session in loaded:
    try:
        store.save(session, make_memory(me, me))
        print("saved")
    except Conflict:
        print("conflict")
"""


def test_of_two_processes_one_wins_and_the_other_is_told(
    store: SessionStore, place: str, memory: MakeMemory, tmp_path: Path
) -> None:
    for i in range(20):
        store.create(f"s{i}")
    go = tmp_path / "go"
    command = [sys.executable, "-c", WRITER, str(HERE), place]
    writers = [subprocess.Popen([*command, str(me), str(go)], stdout=subprocess.PIPE, text=True) for me in (1, 2)]
    for writer in writers:
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
    go.touch()
    said = [writer.communicate(timeout=60)[0].split() for writer in writers]
    for i, outcomes in enumerate(zip(*said, strict=True)):
        assert sorted(outcomes) == ["conflict", "saved"]
        loaded, state = store.load(f"s{i}")
        winner = outcomes.index("saved") + 1
        assert loaded.generation == 1 and state == memory(winner, winner).data
    assert len(said[0]) == 20


def test_threads_of_one_process_exclude_each_other(store: SessionStore, memory: MakeMemory) -> None:
    """Forty increments by eight threads, each tried until it is not in conflict: none is lost."""
    store.save(store.create("counter"), memory(0, 0))

    def count() -> None:
        for _ in range(5):
            while True:
                loaded, _ = store.load("counter")
                try:
                    store.save(loaded, memory(loaded.tokens + 1, 0))
                    break
                except Conflict:
                    time.sleep(0.001)

    threads = [threading.Thread(target=count) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    loaded, _ = store.load("counter")
    assert (loaded.tokens, loaded.generation) == (40, 41)


SAVER = """
import sys
sys.path.insert(0, sys.argv[1])
from fake_memory_server import make_memory
from llamamem.sessions import open_store
store = open_store(sys.argv[2])
session, _ = store.load("alice")
for i in range(10**9):
    session = store.save(session, make_memory(session.generation + 1, session.generation + 1))
    if i == 0:
        print("ready", flush=True)
"""


def test_kill_9_during_saves_leaves_a_whole_session(store: SessionStore, place: str, memory: MakeMemory) -> None:
    last = store.save(store.create("alice"), memory(1, 1))
    for i in range(6):
        saver = subprocess.Popen([sys.executable, "-c", SAVER, str(HERE), place], stdout=subprocess.PIPE, text=True)
        assert saver.stdout is not None and saver.stdout.readline() == "ready\n"
        time.sleep(0.013 * i)
        saver.kill()
        saver.communicate()
        loaded, state = store.load("alice")
        assert loaded.generation == loaded.tokens > last.generation
        assert state == memory(loaded.tokens, loaded.tokens).data
        assert [entry.fault for entry in store.entries(verify=True)] == [None]
        last = store.save(loaded, memory(loaded.generation + 1, loaded.generation + 1))
    assert store.total_bytes() == len(memory(1).data)


def test_an_error_within_a_save_leaves_the_old_session(
    store: SessionStore, make_store: MakeStore, memory: MakeMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = store.save(store.create("alice"), memory(1, 1))

    def fail(*_: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(type(store), "_check_quota", fail)
    grown = Memory(memory(2, 2).data + b"more", 2, "5c" * 32, "ba" * 32)
    store_with_quota = make_store(quota=1)
    with pytest.raises(RuntimeError):
        store_with_quota.save(saved, grown)
    loaded, state = store.load("alice")
    assert loaded.generation == 1 and state == memory(1, 1).data


def test_a_save_over_the_quota_is_refused(make_store: MakeStore, memory: MakeMemory) -> None:
    size = len(memory(1).data)
    store = make_store(quota=2 * size)
    for name in ("a", "b"):
        store.save(store.create(name), memory(1))
    empty = store.create("c")
    for change in (lambda: store.save(empty, memory(1)), lambda: store.create("d", from_="a")):
        with pytest.raises(LlamamemError, match=rf"{3 * size} bytes.*quota of {2 * size}.*rm.*prune") as refused:
            change()
        assert refused.value.exit_status == 2
    assert names(store) == ["a", "b", "c"], "nothing was removed to make room, nothing half made"
    assert store.load("c")[1] is None and store.total_bytes() == 2 * size
    store.save(store.load("a")[0], memory(2)), "what does not grow may be saved"
    store.remove("b")
    store.save(store.load("c")[0], memory(1))


def test_a_full_store_may_still_shrink_and_be_used(make_store: MakeStore, memory: MakeMemory) -> None:
    make_store().save(make_store().create("a"), memory(1))
    store = make_store(quota=10)
    loaded, state = store.load("a")
    assert state == memory(1).data
    store.save(loaded, memory(2))
    store.remove("a")
    assert store.total_bytes() == 0


def test_prune_removes_what_was_not_used(
    store: SessionStore, memory: MakeMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = now()

    def at(days: float) -> None:
        for module in (session, rows):
            monkeypatch.setattr(module, "now", lambda: begin + timedelta(days=days))

    at(0)
    for name in ("unused", "loaded", "saved", "copied"):
        store.save(store.create(name), memory(1))
    kept = store.load("saved")[0]
    at(20)
    store.load("loaded")
    store.save(kept, memory(2))
    store.create("copy", from_="copied")
    store.create("empty")
    at(31)
    assert store.prune(timedelta(days=30)) == ["unused"]
    assert names(store) == ["copied", "copy", "empty", "loaded", "saved"]
    assert store.prune(timedelta(days=30)) == []
    at(60)
    assert store.prune(timedelta(days=30)) == ["copied", "copy", "empty", "loaded", "saved"]
    assert store.total_bytes() == 0


def test_listing_is_no_use(store: SessionStore, memory: MakeMemory) -> None:
    used = store.save(store.create("alice"), memory(1)).used
    store.entries()
    store.total_bytes()
    entry = store.entries()[0]
    assert entry.session is not None and entry.session.used == used


def test_open_store_reads_the_place(store: SessionStore, place: str) -> None:
    opened = open_store(place, quota=5)
    assert type(opened) is type(store) and opened.location == store.location
    store.create("alice")
    assert names(opened) == ["alice"]


def test_undo_brings_the_generation_before_back_and_undone_twice_all_is_as_it_was(
    store: SessionStore, memory: MakeMemory
) -> None:
    first = store.save(store.create("alice"), memory(1, 1))
    second = store.save(first, memory(2, 2))
    assert second.before is not None and (second.before.generation, second.before.tokens) == (1, 1)
    assert second.saved is not None and second.saved == second.used
    undone = store.undo("alice")
    assert (undone.generation, undone.tokens, undone.saved) == (3, 1, first.saved)
    assert store.load("alice")[1] == memory(1, 1).data
    with pytest.raises(Conflict, match="generation 3 over 2"):
        store.save(second, memory(9, 9))
    assert store.undo("alice").tokens == 2 and store.load("alice")[1] == memory(2, 2).data
    assert [entry.fault for entry in store.entries(verify=True)] == [None]


def test_the_first_save_can_be_undone_and_none_at_all_cannot(store: SessionStore, memory: MakeMemory) -> None:
    made = store.create("alice")
    for use in (lambda: store.undo("alice"), lambda: store.undo("nobody")):
        with pytest.raises(LlamamemError, match=r"no generation before|not in"):
            use()
    store.save(made, memory(1, 1))
    assert store.undo("alice").state_sha256 is None and store.load("alice")[1] is None
    copy = store.create("bob", from_="alice")
    assert copy.before is None


def test_only_the_generation_before_is_kept_and_the_quota_does_not_count_it(
    make_store: MakeStore, memory: MakeMemory
) -> None:
    size = len(memory(1).data)
    store = make_store(quota=size)
    session = store.create("alice")
    for i in range(5):
        session = store.save(session, memory(i, i))
    assert store.total_bytes() == size
    assert session.before is not None and session.before.generation == 4


def test_what_was_removed_is_in_no_file_of_the_store(store: SessionStore, memory: MakeMemory, tmp_path: Path) -> None:
    """Neither the newest memory nor the one before, nor in pages that are free now."""
    marks = [b"what-anna-said-%d" % i for i in range(3)]
    session = store.create("anna")
    for mark in marks:
        session = store.save(session, Memory(mark * 50, 1, "5c" * 32, "ba" * 32))
    store.create("bob")
    store.remove("anna")
    left = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()) + held(store)
    assert not any(mark in left for mark in [*marks, b"anna"])


def test_pages_follow_each_other_and_hold_every_session_once(store: SessionStore, memory: MakeMemory) -> None:
    made = [f"session {i}" for i in range(25)]
    for name in made:
        store.create(name)
    found: list[str] = []
    while page := store.entries(after=found[-1] if found else None, limit=7):
        assert len(page) <= 7
        found += [entry.label for entry in page]
    assert sorted(found) == sorted(made)
    assert names(store) == sorted(made)
    assert store.names("session 1", 100) == sorted(n for n in made if n.startswith("session 1"))
    assert len(store.names("", 4)) == 4 and store.names("x", 4) == []


def cut_state(store: SessionStore, name: str) -> None:
    """Takes the first bytes of the state away, behind the store's back."""
    if isinstance(store, SqliteStore):
        with closing(sqlite3.connect(store.path)) as db, db:
            db.execute("UPDATE session SET state = substr(state, 9) WHERE name = ?", (name,))
    elif isinstance(store, PostgresStore):
        query = "UPDATE llamamem_session SET state = substr(state, 9) WHERE name = %s"
        store._do(lambda db: db.execute(query, (name,)))
    elif isinstance(store, ValkeyStore):
        key = store._session(name)
        store._client.hset(key, "state", store._client.hget(key, "state")[8:])
    else:
        os.truncate(next(Path(store.location).rglob(f"{hashlib.sha256(name.encode()).hexdigest()}-1.state")), 9)


def test_a_state_that_is_cut_is_listed_without_reading_states(store: SessionStore, memory: MakeMemory) -> None:
    store.save(store.create("alice"), memory(1, 1))
    store.save(store.create("bob"), memory(1, 1))
    cut_state(store, "alice")
    faults = {entry.label: entry.fault for entry in store.entries()}
    assert faults["bob"] is None and "its state is damaged" in str(faults["alice"])


def test_files_and_directories_are_the_owners_alone_also_those_that_were_there(
    make_store: MakeStore, memory: MakeMemory, tmp_path: Path
) -> None:
    store = make_store()
    if not isinstance(store, DirectoryStore | SqliteStore):
        pytest.skip("its files are the server's")
    store.save(store.create("alice"), memory(1, 1))
    place = tmp_path / "store" if (tmp_path / "store").exists() else tmp_path / "store.db"
    place.chmod(0o755 if place.is_dir() else 0o644)
    store.save(store.create("bob"), memory(1, 1))
    for path in (place, *place.rglob("*")):
        if path.suffix != ".lock":  # which are empty
            assert path.stat().st_mode & 0o077 == 0, path


@pytest.mark.parametrize("n", [2000])
def test_listing_and_pruning_take_time_in_proportion(store: SessionStore, n: int) -> None:
    """A quadratic store took 285 s for 10,000; four times as many may take no more than some four times as long."""

    def seconds() -> float:  # the least of three: other work on the machine only adds to it
        return min(once() for _ in range(3))

    def once() -> float:
        start = time.perf_counter()
        assert store.prune(timedelta(days=9)) == [] and store.names("session", 5)
        store.entries()
        return time.perf_counter() - start

    for i in range(n // 4):
        store.create(f"session {i}")
    few = seconds()
    for i in range(n // 4, n):
        store.create(f"session {i}")
    assert seconds() < 12 * few + 0.5
