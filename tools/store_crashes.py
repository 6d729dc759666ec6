"""Stores whose writer, server or disk fails in the middle."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from store_checks import HERE, Size
from store_places import Place, memory, small_disk
from store_servers import postgres_server, redis_server

from llamamem.errors import LlamamemError
from llamamem.sessions import Full, Unreachable
from llamamem.sessions.session import Conversation, new_session

SAVER = """
import sys
sys.path[:0] = [sys.argv[1]]
from store_places import memory
from llamamem.sessions import open_store
from llamamem.sessions.session import Conversation
store = open_store(sys.argv[2])
last = store.read("a").session
while True:
    last = store.save(last, memory(last.tokens + 1), conversation=Conversation(), origin=memory(last.tokens).data)
    print(last.tokens, flush=True)
"""


def killed_writers(place: Place, size: Size) -> str:
    """kill -9 of a writer at random moments: what it said it saved is there, or the one after that, whole."""
    draw, store, saves = random.Random(size.seed), place.open(), 0
    store.save(new_session("a", None), memory(0), new=True)
    for _ in range(size.kills):
        told = [sys.executable, "-c", SAVER, str(HERE), place.url]
        writer = subprocess.Popen(told, stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        said = [int(writer.stdout.readline())]
        time.sleep(draw.uniform(0, 0.1))
        writer.kill()
        said += [int(line) for line in writer.stdout if line.endswith("\n")]
        writer.wait()
        record = store.read("a")
        assert record.session.tokens in (said[-1], said[-1] + 1), (said[-1], record.session.tokens)
        assert record.state == memory(record.session.tokens).data
        assert record.origin == memory(record.session.tokens - 1).data
        assert [entry.fault for entry in place.open().entries(verify=True)] == [None]
        saves = record.session.tokens
    assert store.total_bytes() == 2 * len(memory(1).data)
    store.remove("a")
    assert store.entries() == [] and store.total_bytes() == 0
    return f"{size.kills} kills, {saves} saves"


def killed_server(place: Place, size: Size) -> str:
    """kill -9 of the server during saves of eight writers, and a start: who was told that it is saved finds it."""
    assert place.server is not None
    store, draw = place.open(), random.Random(size.seed)
    acknowledged = dict.fromkeys(range(8), 0)
    stop, faults, unreachable = threading.Event(), [], [0]
    for i in acknowledged:
        store.save(new_session(f"s{i}", None), memory(0), new=True)

    def write(i: int) -> None:
        mine = place.open()
        try:
            while not stop.is_set():
                try:
                    last = mine.read(f"s{i}").session
                    assert last.tokens in (acknowledged[i], acknowledged[i] + 1), f"{acknowledged[i]}: {last.tokens}"
                    acknowledged[i] = mine.save(last, memory(last.tokens + 1)).tokens
                except Unreachable:
                    unreachable[0] += 1
                    time.sleep(0.02)
        except BaseException as e:
            faults.append(e)
        finally:
            mine.close()

    writers = [threading.Thread(target=write, args=(i,)) for i in acknowledged]
    for writer in writers:
        writer.start()
    try:
        for _ in range(size.kills):
            time.sleep(draw.uniform(0.05, 0.3))
            place.server.kill()
            time.sleep(draw.uniform(0, 0.1))
            place.server.start()
        time.sleep(0.2)
    finally:
        stop.set()
        for writer in writers:
            writer.join()
    assert not faults, faults[0]
    for i, tokens in acknowledged.items():
        record = place.open().read(f"s{i}")
        assert record.session.tokens in (tokens, tokens + 1) and record.state == memory(record.session.tokens).data
    assert unreachable[0] > 0, "nobody noticed"
    store.close()
    return f"{size.kills} kills of the server, {sum(acknowledged.values())} saves acknowledged, none lost"


def full_disk(kind: str, size: Size) -> str:
    """A disk without room: one line, the session as it was; it can be read and removed, and then there is room."""
    with small_disk({"directory": 2, "sqlite": 2, "valkey": 4, "postgres": 150}[kind]) as folder:
        if kind == "directory":
            return _filled(Place(kind, str(folder / "store")), folder)
        if kind == "sqlite":
            return _filled(Place(kind, f"sqlite:{folder}/store.db"), folder)
        if kind == "postgres":  # its log, too, is on the disk
            with postgres_server("max_wal_size=16MB", within=folder) as server:
                return _filled(Place(kind, server.url, server), folder)
        memory_of_server = ("--maxmemory", "8mb", "--maxmemory-policy", "noeviction", "--appendonly", "no")
        with redis_server(*memory_of_server, within=folder) as server:
            return _filled(Place(kind, server.url, server), folder)


def _filled(place: Place, folder: Path) -> str:
    store, n = place.open(), 0
    first = store.save(new_session("first", None), memory(1, 100_000), new=True)
    filler = folder / "filler"
    said = ""
    if place.kind == "postgres":
        filler.write_bytes(b"")
        with suppress(OSError), filler.open("wb") as file:  # most of the room
            left = 40 << 20
            while left > 0:
                left -= file.write(b"\0" * (1 << 20))
    while not said:
        assert n < 5000, "it never got full"
        try:
            store.save(new_session(f"s{n}", None), memory(n, 100_000), new=True)
            n += 1
        except (Full, Unreachable) as e:
            said = str(e)
            assert isinstance(e, Full) and "\n" not in said and "Traceback" not in said, e
    filler.unlink(missing_ok=True)
    if place.kind == "postgres" and place.server is not None:  # it may have stopped: a log without room is its end
        with suppress(LlamamemError):
            store.read("first")
        place.server.kill()
        place.server.start()
    record = store.read("first")
    assert record.session == first and record.state == memory(1, 100_000).data
    assert store.load("first")[1] == memory(1, 100_000).data
    found = [entry for entry in store.entries(verify=True) if not entry.fault]
    assert len(found) >= n + 1, f"{len(found)} of {n + 1} are whole"
    for entry in store.entries():
        if entry.label != "first":
            with suppress(LlamamemError):
                store.remove(entry.label)
    assert [entry.label for entry in store.entries()] == ["first"]
    store.save(store.load("first")[0], memory(2, 100_000), conversation=Conversation(), origin=b"o")
    assert store.undo("first").tokens == 1
    store.close()
    return f"full after {n} sessions of 100 kB: {said.split(':', 1)[1].strip()[:90]}"
