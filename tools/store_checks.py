"""What every kind of store is held to: each check takes a place that is empty, and a size, and raises if it fails."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from store_places import Place, Wire, memory

from llamamem.errors import LlamamemError
from llamamem.sessions import Busy, Conflict, Full, SessionStore, Unreachable
from llamamem.sessions.session import Conversation, new_session

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Size:
    writers: int = 1000  # on `contended` sessions
    contended: int = 20
    processes: int = 8
    kills: int = 20
    sessions: int = 2000  # in a listing
    seed: int = 1


SHORT = Size(writers=60, contended=2, processes=2, kills=2, sessions=300)

WRITER = """
import sys
sys.path[:0] = [sys.argv[1]]
from store_checks import count_up
from llamamem.sessions import open_store
print("ready", flush=True)
sys.stdin.readline()
count_up(open_store(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5] == "lease")
"""


def count_up(store: SessionStore, threads: int, sessions: int, with_lease: bool) -> None:
    """So many threads, each of which adds one to the number in a session, once, until it has."""

    def add(i: int) -> None:
        name, owner = f"counter {i % sessions}", f"{time.time_ns()}-{i}"
        while True:
            try:
                if with_lease:
                    record = store.lease(name, owner, 30)
                    assert record is not None
                    found = record.session
                else:
                    found = store.read(name).session
                store.save(found, memory(found.tokens + 1))
            except (Busy, Conflict):
                time.sleep(random.uniform(0.001, 0.02))
                continue
            if with_lease:
                store.release(name, owner)
            return

    _all(threads, add)


def compare_and_set(place: Place, size: Size) -> str:
    """Writers of other processes and threads, each adds one: with leases and without, none is lost."""
    store = place.open()
    for how in ("none", "lease"):
        for i in range(size.contended):
            with suppress(LlamamemError):
                store.remove(f"counter {i}")
            store.save(new_session(f"counter {i}", None), memory(0), new=True)
        each = size.writers // size.processes
        told = [sys.executable, "-c", WRITER, str(HERE), place.url, str(each), str(size.contended), how]
        writers = [
            subprocess.Popen(told, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for _ in range(size.processes)
        ]
        for writer in writers:
            assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
        for writer in writers:
            assert writer.stdin is not None
            writer.stdin.write("go\n")
            writer.stdin.flush()
        for writer in writers:
            assert writer.wait(600) == 0
        records = [store.read(f"counter {i}") for i in range(size.contended)]
        counted = sum(record.session.tokens for record in records)
        assert counted == each * size.processes, f"{counted} of {each * size.processes} are counted"
        for record in records:
            assert record.state == memory(record.session.tokens).data
            assert record.session.generation == record.session.tokens + 1
    return f"{size.writers} writers on {size.contended} sessions, without and with leases: none lost"


def quotas(place: Place, size: Size) -> str:
    """Writers who would all fit alone: as many are saved as there is room for, in each namespace."""
    n_bytes, room = len(memory(1).data), size.contended
    store = place.open(quota=room * n_bytes)
    saved: list[int] = []

    def save(i: int) -> None:
        with suppress(Full):
            store.save(new_session(f"s{i}", None), memory(i), new=True)
            saved.append(i)

    _all(3 * room, save)
    assert len(saved) == room, f"{len(saved)} saved where {room} have room"
    assert store.total_bytes() == room * n_bytes and len(store.entries()) == room
    other = store.within("another")
    other.save(new_session("s", None), memory(1), new=True)
    assert (other.total_bytes(), store.total_bytes()) == (n_bytes, room * n_bytes)
    loaded = store.load(f"s{saved[0]}")[0]
    for refused in (
        lambda: store.save(loaded, memory(1), conversation=Conversation(), origin=b"more"),
        lambda: store.create("copy", from_=f"s{saved[0]}"),
    ):
        _raises(Full, refused)
    store.save(loaded, memory(2))
    store.remove(f"s{saved[1]}")
    store.create("copy", from_=f"s{saved[0]}")
    return f"{3 * room} writers where {room} have room: {room} saved"


def names(place: Place, size: Size) -> str:
    """Whatever a name has in it, it is one name, and no other's."""
    draw = random.Random(size.seed)
    odd = [
        "a",
        "A",
        "\u00e9",
        "e\u0301",
        "../../etc/passwd",
        "a/b",
        "..",
        "-rf",
        "%00",
        ":",
        "{a}",
        "*",
        "'; --",
        "a:b",
        "b:a",
    ]
    odd += ["x" * 200, "\U0001f9e0" * 200, "[a-z]*", "\\", '"', "+", "(a", "[a", "-", "\u00ff", " a"]
    letters = [c for c in map(chr, range(33, 0x3000)) if c.isprintable()]
    odd += ["".join(draw.choices(letters, k=draw.randint(1, 60))) for _ in range(100)]
    odd = sorted(set(odd))
    store = place.open()
    for namespace in ("", "a", "a:b", "%", "../b"):
        within = store.within(namespace)
        for i, name in enumerate(odd):
            within.save(new_session(name, None), memory(i, 80), new=True)
    for namespace in ("", "a", "a:b", "%", "../b"):
        within = store.within(namespace)
        assert [entry.label for entry in within.entries()] == odd
        for i, name in enumerate(odd):
            assert within.read(name).state == memory(i, 80).data
    for name in odd:
        store.remove(name)
    assert store.entries() == [] and len(store.within("a:b").entries()) == len(odd)
    return f"{len(odd)} names in 5 namespaces"


def leases(place: Place, size: Size) -> str:
    """One owner at a time; an end, a release and a renewal; for names that nobody has, too."""
    store, other = place.open(), place.open()
    assert store.lease("new", "me", 30) is None, "there is none yet"
    busy = _raises(Busy, lambda: other.lease("new", "you", 30))
    assert isinstance(busy, Busy) and busy.until is not None
    saved = store.save(new_session("new", None), memory(1), new=True)
    again = store.lease("new", "me", 0.4)
    assert again is not None and again.session.generation == 1, "its owner gets it again, for another time"
    _raises(Busy, lambda: other.lease("new", "you", 30))
    other.release("new", "you"), "which is not its to end"
    _raises(Busy, lambda: other.lease("new", "you", 30))
    assert other.within("elsewhere").lease("new", "you", 30) is None, "another namespace's"
    time.sleep(0.5)
    taken = other.lease("new", "you", 30)
    assert taken is not None, "it has ended"
    _raises(Busy, lambda: store.lease("new", "me", 30))
    store.release("new", "me"), "nothing of its own any more"
    _raises(Busy, lambda: store.lease("new", "me", 30))
    other.save(taken.session, memory(2))
    _raises(Conflict, lambda: store.save(saved, memory(3)))
    other.release("new", "you")
    record = store.lease("new", "me", 30)
    assert record is not None and record.state == memory(2).data
    store.remove("new")
    _raises(Busy, lambda: other.lease("new", "you", 30))
    return "taken, kept, renewed, ended, released"


def generations(place: Place, size: Size) -> str:
    """An undo brings back the generation before whole: memory, open conversation, and what that began on."""
    store = place.open()
    told = [
        (memory(1), None, None),
        (memory(2), Conversation(id="first"), memory(1).data),
        (memory(3), Conversation(id="first", only=False), memory(1).data),
        (memory(4), Conversation(id="second"), None),
    ]
    session = store.create("a")
    for kept, conversation, origin in told:
        session = store.save(session, kept, conversation=conversation, origin=origin)
    for i in (2, 3, 2):
        undone = store.undo("a")
        kept, conversation, origin = told[i]
        record = place.open().read("a")
        assert record == (undone, kept.data, origin) and record.session.conversation == conversation
        assert record.session.tokens == kept.tokens
    copy = store.create("b", from_="a")
    assert copy.conversation is None and store.read("b").origin is None and store.read("b").state == memory(3).data
    assert store.total_bytes() == 3 * len(memory(1).data)
    assert [entry.fault for entry in store.entries(verify=True)] == [None, None]
    before = store.removals()
    store.remove("a")
    assert store.removals() > before and [e.label for e in store.entries()] == ["b"]
    return "undone thrice, with conversations"


def pages(place: Place, size: Size) -> str:
    """Pages that are read while others make, save and remove sessions have each that was there throughout, once."""
    store = place.open()
    steady = {f"steady {i}" for i in range(size.sessions)}
    for name in steady:
        store.create(name)
    stop = threading.Event()

    def trouble(i: int) -> None:
        mine, n = place.open(), 0
        while not stop.is_set():
            mine.create(f"passing {i} {n}")
            mine.load(f"steady {n % size.sessions}")
            if n:
                mine.remove(f"passing {i} {n - 1}")
            n += 1

    threads = [threading.Thread(target=trouble, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    try:
        for limit in (1000, 37, 100):
            found: list[str] = []
            while page := store.entries(after=found[-1] if found else None, limit=limit):
                assert len(page) <= limit and all(entry.fault is None for entry in page), page
                found += [entry.label for entry in page]
            assert len(found) == len(set(found)), "one was listed twice"
            assert steady <= set(found), f"{len(steady - set(found))} were not listed"
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    return f"{size.sessions} sessions, three times, beside four writers"


def cut_wire(place: Place, size: Size) -> str:
    """Connections that end at any byte: what was acknowledged is there, what was not is whole or not there."""
    assert place.server is not None
    wire = Wire(place.server, draw=random.Random(size.seed))
    through, store = Place(place.kind, wire.url).open(), place.open()
    last = store.save(new_session("a", None), memory(0), new=True)
    lost = 0
    while wire.cuts < 5 * size.kills:
        try:
            saved = through.save(last, memory(last.tokens + 1))
            assert saved.tokens == last.tokens + 1
        except (Unreachable, Conflict):
            lost += 1
        record = store.read("a")
        assert record.session.tokens in (last.tokens, last.tokens + 1)
        assert record.state == memory(record.session.tokens).data
        last = record.session
    wire.close()
    through.close()
    return f"{last.tokens} saves through {wire.cuts} cuts, {lost} of them told as lost"


def _all(threads: int, run: Callable[[int], None]) -> None:
    faults: list[BaseException] = []

    def kept(i: int) -> None:
        try:
            run(i)
        except BaseException as e:
            faults.append(e)

    running = [threading.Thread(target=kept, args=(i,)) for i in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    if faults:
        raise faults[0]


def _raises(kind: type[LlamamemError], call: Callable[[], object]) -> LlamamemError:
    try:
        call()
    except kind as e:
        return e
    raise AssertionError(f"no {kind.__name__}")


CHECKS = (compare_and_set, quotas, names, leases, generations, pages)
SERVER_CHECKS = (cut_wire,)
