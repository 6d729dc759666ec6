"""Does every request get the memory that it names, and no other? Seeded requests on a real server, against an oracle.

    python tools/entitlement.py --checks 2000 --profile batched
    python tools/entitlement.py --checks 2000 --profile stock-defaults --seed 7

A server of that profile with the demo model is asked in all ways that there are, one after another and at once: with
and without a slot, with a memory in the request, frozen, scaled, `n` times, in a stream, cancelled; texts go on, are
edited, said again; memories are saved, resumed, reset; the server sleeps and starts anew. What each answer and each
memory must be is computed by a second server that is given just the origin, the setting and the text of it
(entitled/fresh.py); which those are, the oracle knows from the two rules alone (entitled/oracle.py).

Exit status: 0 none was wrong, 1 one was (with the seed and the shortest history that was found), 2 it could not be run.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entitled.draw import Draw
from entitled.driver import Driver, Tally, Wrong
from entitled.fresh import Reference
from entitled.memory import EMPTY, PLAIN, Setting, distance, with_values
from entitled.oracle import Oracle
from entitled.routes import rendered
from entitled.steps import Step, Together
from entitled.wire import HttpServer, NoAnswer

from llamamem.errors import LlamamemError
from llamamem.formats.demo_files import demo_files
from llamamem.native.build import find_build

# by profile: slots, tokens of context, and what its server is started with, by turns
CACHES = [[], ["--cache-ram", "1"], ["--cache-ram", "0"], ["--ctx-checkpoints", "3", "-ub", "16"]]
ASLEEP = ["--sleep-idle-seconds", "1"]
PROFILES: dict[str, tuple[int, int, list[list[str]]]] = {
    "serial": (1, 768, [[], ASLEEP]),
    "fused": (1, 768, [*CACHES, ASLEEP]),
    "batched": (4, 4 * 640, [*CACHES, ASLEEP, ["--cache-idle-slots"]]),
    "batched-unified": (4, 1400, [*CACHES, ASLEEP]),
    "stock-defaults": (4, 1400, [[], ["--cache-ram", "1"], ASLEEP]),
}


@dataclass
class Session:
    """A server under test, the reference beside it, and what is known of both."""

    server: Any
    reference: Reference
    n_slots: int
    variants: list[list[str]]
    rng: random.Random
    tally: Tally

    def run(self, checks: int, starts: int) -> Fault | None:
        """So many checks, over so many starts of the server."""
        oracle = Oracle(self.n_slots)
        draw = Draw(self.rng, oracle)
        self.prepare(draw)
        for i in range(starts):
            extra = self.variants[i % len(self.variants)]
            before = (dict(oracle.memories), dict(oracle.slot_files))
            self.server.start(extra)
            oracle.restarted()
            draw.sleeps = "--sleep-idle-seconds" in extra
            driver, history = Driver(self.server, self.reference, oracle, self.tally, draw), list[Step]()
            try:
                while self.tally.checks < checks * (i + 1) / starts:
                    history.append(draw.step())
                    driver.take(history[-1])
                driver.look()
            except Wrong as e:
                return Fault(str(e), extra, history, before, self.server.log[-600:])
        return None

    def prepare(self, draw: Draw) -> None:
        """Memories to begin with, and one whose values no model bears."""
        for _ in range(4):
            origin = self.rng.choice([EMPTY, *draw.memories])
            draw.keep(self.reference.memory(origin, PLAIN, self.reference.ids(rendered((draw.said(),)))))
        draw.zeros = with_values(draw.memories[0], 0.0)
        draw.huge = with_values(draw.memories[0], 3e38)

    def shrink(self, fault: Fault, seconds: float) -> None:
        """Leaves out of a history what is not needed for something to be wrong, as far as time allows."""
        until, size = time.monotonic() + seconds, len(fault.history) // 2
        while size and time.monotonic() < until:
            at, before = 0, len(fault.history)
            while at < len(fault.history) and time.monotonic() < until:
                at += 0 if self.shorter(fault, fault.history[:at] + fault.history[at + size :]) else size
            size = size // 2 if size > 1 or len(fault.history) == before else 1
        for at in range(len(fault.history) - 1, -1, -1):
            while at < len(fault.history) and time.monotonic() < until:
                if not any(
                    self.shorter(fault, [*fault.history[:at], fewer, *fault.history[at + 1 :]])
                    for fewer in without_one(fault.history[at])
                ):
                    break

    def shorter(self, fault: Fault, history: list[Step]) -> bool:
        """Whether something is wrong in that history too, which is then the fault; a short one is told three times."""
        for _ in range(3 if len(history) <= 6 else 1):
            if found := self.again(fault, history):
                fault.history, fault.what = history[: found[0]], found[1]
                return True
        return False

    def again(self, fault: Fault, history: list[Step]) -> tuple[int, str] | None:
        """Tells a history anew: after how many steps something was wrong, and what."""
        oracle = Oracle(self.n_slots)
        oracle.memories, oracle.slot_files = map(dict, fault.files)
        self.server.start(fault.extra, again=True)
        driver = Driver(self.server, self.reference, oracle, Tally())
        for i, step in enumerate(history):
            try:
                driver.take(step)
                if i == len(history) - 1:
                    driver.look()
            except (Wrong, NoAnswer) as e:
                return i + 1, str(e)
        return None


@dataclass
class Fault:
    """What was wrong, and all that led to it since the server's last start."""

    what: str
    extra: list[str]
    history: list[Step]
    files: tuple[dict[str, Any], dict[str, Any]]
    log: str

    def __str__(self) -> str:
        steps = "\n".join(f"  {i + 1:>3}  {step}" for i, step in enumerate(self.history))
        log = f"\n\nthe server's log ends:\n{self.log}" if self.log else ""
        return f"WRONG: {self.what}\nhistory since the start with {self.extra}:\n{steps}{log}"


def without_one(step: Step) -> list[Step]:
    """A step of several requests, without each of them in turn."""
    asks = step.asks if isinstance(step, Together) else ()
    return [Together(asks[:i] + asks[i + 1 :]) for i in range(len(asks))] if len(asks) > 1 else []


def spread(reference: Reference, rng: random.Random) -> tuple[float, float]:
    """How far a wrong origin moves a memory and a wrong scale, in units of what rounding may do: both far above 1."""
    oracle = Oracle(1)
    draw = Draw(rng, oracle)
    origins = [EMPTY, *(reference.memory(EMPTY, PLAIN, reference.ids(rendered((draw.said(),)))) for _ in range(4))]
    text = reference.ids(rendered((draw.said(),)))
    after = [reference.memory(origin, PLAIN, text) for origin in origins]
    scaled = [reference.memory(origin, Setting(scale=0.5), text) for origin in origins[1:]]
    return (
        min(distance(a, b) for i, a in enumerate(after) for b in after[:i]),
        min(distance(a, b) for a, b in zip(after[1:], scaled, strict=True)),
    )


@contextmanager
def servers(profile: str, directory: Path, bin_dir: Path, right_dir: Path) -> Iterator[tuple[HttpServer, Reference]]:
    """The server under test, not yet started, and the reference."""
    _, context, _ = PROFILES[profile]
    tested = HttpServer(demo_files(), bin_dir, directory / "tested", profile, context)
    plain = "serial" if profile == "serial" else "fused"
    other = HttpServer(demo_files(), right_dir, directory / "reference", plain, 2048)
    try:
        other.start([] if plain == "serial" else ["--cache-ram", "0", "--ctx-checkpoints", "0", "--no-cache-prompt"])
        yield tested, Reference(other)
    finally:
        tested.stop()
        other.stop()


def prove(
    profile: str,
    seed: int,
    checks: int,
    directory: Path,
    *,
    starts: int = 0,
    shrink: float = 0.0,
    bin_dir: Path | None = None,
    right_dir: Path | None = None,
) -> Proof:
    """So many checks of that profile, until one is wrong; of the build that is found, or of any at `bin_dir`.

    The reference is of the same build, or of that at `right_dir`.

    Raises LlamamemError where right and wrong lie too close.
    """
    n_slots, _, variants = PROFILES[profile]
    tested_dir = bin_dir or Path(find_build().bin_dir)
    with servers(profile, directory, tested_dir, right_dir or tested_dir) as (tested, reference):
        origins, scales = spread(reference, random.Random(seed))
        if min(origins, scales) < 3:
            raise LlamamemError(f"a wrong origin ({origins:.1f}) or scale ({scales:.1f}) could pass for rounding")
        tally = Tally()
        session = Session(tested, reference, n_slots, variants, random.Random(f"{profile} {seed}"), tally)
        fault = session.run(checks, starts or len(variants))
        if fault is not None:
            session.shrink(fault, shrink)
    return Proof(profile, seed, tally, origins, scales, fault)


@dataclass
class Proof:
    profile: str
    seed: int
    tally: Tally
    origins: float
    scales: float
    fault: Fault | None

    def __str__(self) -> str:
        tally = self.tally
        told = f"seed {self.seed}, profile {self.profile}, after {tally.checks} checks\n{self.fault}\n\n"
        rows = "\n".join(f"{n:>7}  {kind}" for kind, n in sorted(tally.kinds.items()))
        return f"""{told if self.fault else ""}profile {self.profile}, seed {self.seed}
{rows}
{100 * tally.reused / max(1, tally.read):>6.0f}%  of the prompt tokens were not read again
{tally.furthest:>7.2f}  of what rounding may do: the furthest memory that is right
{self.origins:>7.0f}  on a wrong origin, at least
{self.scales:>7.0f}  at a wrong scale, at least
{tally.checks} checks, {int(self.fault is not None)} wrong"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checks", type=int, default=2000)
    parser.add_argument("--profile", choices=PROFILES, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--starts", type=int, default=0, help="of the server; one of each kind that it has, if not given"
    )
    parser.add_argument("--bin-dir", type=Path, help="any build of llama-server with the memory in it, edited or not")
    parser.add_argument("--shrink", type=float, default=60.0, help="seconds for a shorter history of what is wrong")
    args = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="llamamem-entitlement-") as name:
        given = (args.profile, args.seed, args.checks, Path(name))
        proof = prove(*given, starts=args.starts, shrink=args.shrink, bin_dir=args.bin_dir)
    print(f"{proof}, {time.monotonic() - started:.0f} s")
    return 1 if proof.fault else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (LlamamemError, RuntimeError, NoAnswer) as e:
        print(f"entitlement: {e}", file=sys.stderr)
        sys.exit(2)
