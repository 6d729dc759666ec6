"""Is every token of a conversation in its session's memory once? Seeded clients on two gateways, against fresh reading.

    python tools/exactly_once.py --conversations 500 --seed 1
    python tools/exactly_once.py --conversations 100 --store sqlite:/tmp/once.db

Two `llamamem serve --sessions` with the demo model share one store. Clients resend their history, trim it, edit it, ask
for another answer, branch off, send only what is new, begin with the same words on another day, hang up midway, ask
once more after a time-out, and run title requests beside; servers and gateways are killed and started again between
turns. After each turn the session's memory is compared with that of a third server which read just the text that the
rules say (once/rules.py), on the memory that they say.

Exit status: 0 none was wrong, 1 one was (with what its client had done), 2 it could not be run.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
from entitled.fresh import Reference
from entitled.wire import HttpServer
from once.people import Person, Tally, Wrong
from once.rules import Fresher
from once.served import Served

from llamamem.errors import LlamamemError
from llamamem.formats.demo_files import demo_files
from llamamem.native.build import find_build

PER_PERSON = 5  # conversations


class Turns:
    """Turns run side by side; after every so many `interrupt` is called, while none runs."""

    def __init__(self, every: int, interrupt: Callable[[], None]) -> None:
        self._every, self._interrupt = every, interrupt
        self._condition = threading.Condition()
        self._running, self._begun, self._closed = 0, 0, False
        self.interrupted = 0

    def enter(self) -> None:
        with self._condition:
            self._condition.wait_for(lambda: not self._closed)
            self._begun += 1
            if self._every and self._begun % self._every == 0:
                self._closed = True
                self._condition.wait_for(lambda: self._running == 0)
                self._interrupt()
                self.interrupted += 1
                self._closed = False
                self._condition.notify_all()
            self._running += 1

    def leave(self) -> None:
        with self._condition:
            self._running -= 1
            self._condition.notify_all()


def talk(person: Person, conversations: int, turns: Turns) -> str | None:
    """What was wrong with a client's conversations, None if nothing was."""
    entered = False

    def settled() -> None:
        nonlocal entered
        if entered:
            turns.leave()
        turns.enter()
        entered = True

    person.settled = settled
    try:
        for _ in range(conversations):
            person.converse()
    except (Wrong, httpx.HTTPError) as e:
        history = "\n  ".join(person.log[-12:])
        return f"{person.name} ({person.way}, ids {person.has_ids}, only new {person.only_new}): {e}\n  {history}"
    finally:
        if entered:
            turns.leave()
    return None


def run(
    conversations: int,
    seed: str,
    gateways: Callable[[], list[httpx.Client]],
    fresher: Fresher,
    turns: Turns,
    workers: int,
) -> tuple[Tally, list[str]]:
    """So many conversations of clients that each have a session; what was wrong. `gateways` makes those of a client."""
    faults, tally, lock = list[str](), Tally(), threading.Lock()

    def one(number: int) -> None:
        if faults:
            return
        rng = random.Random(f"{seed} {number}")
        person = Person(f"person-{number}", rng, gateways(), fresher, Tally())
        fault = talk(person, min(PER_PERSON, conversations - number * PER_PERSON), turns)
        with lock:
            tally.add(person.tally)
            if fault is not None:
                faults.append(fault)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(one, range(-(-conversations // PER_PERSON))))
    return tally, faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=500)
    parser.add_argument("--seed", default="1")
    parser.add_argument("--store", default=None, help="a place as --sessions takes it; a directory unless given")
    parser.add_argument("--workers", type=int, default=6, help="clients at a time")
    parser.add_argument("--restart-every", type=int, default=150, help="turns between two kills; 0: none")
    given = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        store = given.store or str(place / "sessions")
        reference = HttpServer(demo_files(), find_build().bin_dir, place / "fresh", "fused", 2048)
        reference.start(["--cache-ram", "0"])
        served = [Served(store, place, name) for name in ("a", "b")]
        rng = random.Random(f"{given.seed} interruptions")

        def interrupt() -> None:
            one = rng.choice(served)
            one.restart() if rng.random() < 0.5 else one.kill_server()

        try:
            for one in served:
                one.start()
            turns = Turns(given.restart_every, interrupt)
            tally, faults = run(
                given.conversations,
                given.seed,
                lambda: [httpx.Client(base_url=one.url, trust_env=False) for one in served],
                Fresher(Reference(reference), reference),
                turns,
                given.workers,
            )
        finally:
            for one in served:
                one.stop()
            reference.stop()
    print(f"{tally.conversations} conversations, {tally.turns} turns; {tally.went_on} went on, {tally.reused} of them")
    print(f"found their text in a KV cache; {turns.interrupted} times something was killed and started again; furthest")
    print(f"{tally.furthest:.2f} of what rounding may do; {tally.ties} answers that nobody heard and rounding may turn")
    print(", ".join(f"{what} {n}" for what, n in sorted(tally.did.items())))
    print(f"{len(faults)} wrong, seed {given.seed}, {time.monotonic() - began:.0f} s")
    for fault in faults:
        print(fault)
    return 1 if faults else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (LlamamemError, RuntimeError, OSError) as e:
        print(f"exactly_once: {e}", file=sys.stderr)
        sys.exit(2)
