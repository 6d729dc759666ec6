"""How long stores take with 1,000, 10,000 and 100,000 sessions: a page of the list, a load, a save, the whole list.

    python tools/store_bench.py                          # prints the table of docs/stores.md
    python tools/store_bench.py --kind sqlite --counts 1000 10000

Milliseconds that the fastest tenth takes at most, so that what else a machine does is not counted; on the disk of
`--folder`. Each save is flushed. The servers are private ones of this machine.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import random
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from store_places import KINDS, memory
from store_servers import SERVERS

from llamamem.sessions import open_store
from llamamem.sessions.session import new_session

PAGE = 100


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
        tenth(lambda: page, repeat),
        tenth(lambda: lambda: store.load(name()), repeat),
        tenth(save, repeat),
        tenth(first, min(repeat, 10), lambda: limited.remove("first")),
        tenth(lambda: store.entries, 1),
    ]
    store.close()
    limited.close()
    return [f"{ms:.1f}" for ms in times]


def tenth(
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
    return sorted(took)[len(took) // 10]


Fill = Callable[[int, int], None]


@contextlib.contextmanager
def filler(kind: str, folder: Path) -> Iterator[tuple[Fill, str]]:
    """What fills the store with sessions by number, and its place. They are laid beside the store's own code, as that
    would write them: through it 100,000 take an hour of flushes."""
    with contextlib.ExitStack() as stack:
        if kind in ("directory", "sqlite"):
            url = str(folder / "store") if kind == "directory" else f"sqlite:{folder}/store.db"
        else:
            folder.chmod(0o755)
            url = stack.enter_context(SERVERS[kind](within=folder)).url
        model = open_store(url)
        model.save(new_session(name_of(0), None), memory(0), new=True)
        text = model.read(name_of(0)).session.model_dump_json()
        rows = {"directory": _files, "sqlite": _sqlite_rows, "valkey": _hashes, "postgres": _postgres_rows}[kind]

        def fill(start: int, end: int) -> None:
            names = map(name_of, range(max(1, start), end))
            rows(model, ((name, text.replace(name_of(0), name), memory(0).data) for name in names))
            assert len(open_store(url).names("user", end + 1)) == end or kind == "directory"

        yield fill, url
        model.close()


Told = Iterable[tuple[str, str, bytes]]


def _files(store: Any, told: Told) -> None:
    for name, text, state in told:
        key = hashlib.sha256(name.encode()).hexdigest()
        folder = store._json(key).parent
        folder.mkdir(mode=0o700, exist_ok=True)
        (folder / f"{key}-1.state").write_bytes(state)
        (folder / f"{key}.json").write_text(text)


def _sqlite_rows(store: Any, told: Told) -> None:
    with contextlib.closing(sqlite3.connect(store.path)) as db, db:
        query = "INSERT INTO session VALUES ('', ?, ?, ?, NULL, NULL, NULL)"
        n = db.executemany(query, told).rowcount
        db.execute("UPDATE used SET bytes = bytes + ?", (n * len(memory(0).data),))


def _hashes(store: Any, told: Told) -> None:
    pipe = store._client.pipeline(transaction=False)
    for i, (name, text, state) in enumerate(told):
        pipe.hset(store._session(name), mapping={"metadata": text, "state": state})
        pipe.zadd(store._key("names"), {name: 0})
        pipe.incrby(store._key("used"), len(state))
        if i % 500 == 0:
            pipe.execute()
    pipe.execute()


def _postgres_rows(store: Any, told: Told) -> None:
    def copy(db: Any) -> None:
        columns = "llamamem_session (namespace, name, metadata, state)"
        with db.cursor().copy(f"COPY {columns} FROM STDIN (FORMAT binary)") as to:
            to.set_types(["text", "text", "text", "bytea"])
            for name, text, state in told:
                to.write_row(("", name, text, state))
        lengths = "SELECT sum(octet_length(state)) FROM llamamem_session"
        db.execute(f"UPDATE llamamem_used SET bytes = ({lengths})")
        db.execute("ANALYZE llamamem_session")

    store._do(copy)


def name_of(number: int) -> str:
    return f"user {number:06d}"


if __name__ == "__main__":
    sys.exit(main())
