"""How long stores take with 1,000, 10,000 and 100,000 sessions: a page of the list, a load, a save, the whole list.

    python tools/store_bench.py                          # prints the table of docs/stores.md
    python tools/store_bench.py --kind sqlite --counts 1000 10000

Medians in milliseconds, on the disk of `--folder`; each save is flushed. The servers are private ones of this machine.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import random
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from store_places import KINDS, memory
from store_servers import postgres_server, redis_server

from llamamem.sessions import SessionStore, open_store
from llamamem.sessions.session import new_session

PAGE = 100
THREADS = 4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kind", action="append", choices=KINDS, help="again for each; else all")
    parser.add_argument("--counts", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--repeat", type=int, default=200)
    parser.add_argument("--folder", type=Path, help="where the stores lie; else a temporary folder")
    args = parser.parse_args()
    print("| store | sessions | page of 100 | load | save | first save, with a quota | whole list |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for kind in args.kind or KINDS:
        with tempfile.TemporaryDirectory(prefix="llamamem-bench-", dir=args.folder) as folder:
            with filler(kind, Path(folder)) as (fill, url):
                for start, end in itertools.pairwise([0, *args.counts]):
                    fill(start, end)
                    print(f"| {kind} | {end:,} | {' | '.join(measured(url, end, args.repeat))} |", flush=True)
    return 0


def measured(url: str, count: int, repeat: int) -> list[str]:
    store, draw = open_store(url), random.Random(count)
    limited = open_store(url, quota=1 << 50)

    def name() -> str:
        return name_of(draw.randrange(count))

    def page() -> None:
        assert store.entries(after=name(), limit=PAGE) is not None

    def save() -> Callable[[], object]:
        session, kept = store.read(name()).session, memory(draw.randrange(1000))
        return lambda: store.save(session, kept)

    def first() -> Callable[[], object]:
        limited.save(new_session("first", None), memory(1), new=True)
        limited.remove("first")
        return lambda: limited.save(new_session("first", None), memory(1), new=True)

    times = [
        median(lambda: page, repeat),
        median(lambda: lambda: store.load(name()), repeat),
        median(save, repeat),
        median(first, max(2, repeat // 10), lambda: limited.remove("first")),
        median(lambda: store.entries, 1),
    ]
    store.close()
    limited.close()
    return [f"{ms:.1f}" for ms in times]


def median(
    prepared: Callable[[], Callable[[], object]], repeat: int, after: Callable[[], object] | None = None
) -> float:
    took = []
    for _ in range(repeat):
        call = prepared()
        begun = time.perf_counter()
        call()
        took.append((time.perf_counter() - begun) * 1000)
        if after is not None:
            after()
    return statistics.median(took)


Fill = Callable[[int, int], None]


@contextlib.contextmanager
def filler(kind: str, folder: Path) -> Iterator[tuple[Fill, str]]:
    """What fills the store with sessions by number, without waiting for a flush each time, and its place."""
    if kind == "directory":
        yield lambda start, end: _unflushed(str(folder / "store"), start, end), str(folder / "store")
    elif kind == "sqlite":
        yield lambda start, end: _in_ram(folder / "store.db", start, end), f"sqlite:{folder}/store.db"
    elif kind == "valkey":
        with redis_server(within=folder) as server:
            import valkey

            def fill(start: int, end: int) -> None:
                client = valkey.Valkey.from_url(server.url.replace("redis", "valkey", 1))
                client.config_set("appendfsync", "no")
                _fill(server.url, start, end)
                client.config_set("appendfsync", "always")
                client.close()

            yield fill, server.url
    else:
        folder.chmod(0o755)
        with postgres_server(within=folder) as server:
            url = server.url
            yield lambda start, end: _fill(f"{url}?options=-csynchronous_commit%3Doff", start, end), url


def _fill(url: str, start: int, end: int) -> None:
    store: SessionStore = open_store(url)

    def run(first: int) -> None:
        for i in range(first, end, THREADS):
            store.save(new_session(name_of(i), None), memory(i), new=True)

    threads = [threading.Thread(target=run, args=(start + i,)) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store.close()
    assert len(open_store(url).entries()) == end


def _unflushed(url: str, start: int, end: int) -> None:
    flush, os.fsync = os.fsync, lambda fd: None
    try:
        _fill(url, start, end)
    finally:
        os.fsync = flush
    os.sync()


def _in_ram(path: Path, start: int, end: int) -> None:
    ram = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else path.parent
    with tempfile.TemporaryDirectory(dir=ram) as folder:
        there = Path(folder) / "filling.db"
        if path.exists():
            shutil.copy(path, there)
        _fill(f"sqlite:{there}", start, end)
        shutil.copy(there, path)
    os.sync()


def name_of(number: int) -> str:
    return f"user {number:06d}"


if __name__ == "__main__":
    sys.exit(main())
