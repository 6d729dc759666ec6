"""Undoes one fix after another in the runtime's sources: tools/entitlement.py must turn red each time.

    python tools/entitlement_mutants.py              # all of them, in this checkout; some minutes each
    python tools/entitlement_mutants.py sticky n     # those whose names begin so

A mutant is an edit of patches/src or of vendor/llama.cpp that takes one fix back. It is applied, llama-server is built
again (only what the edit touches), the tool runs until something is wrong, and the sources are put back, also when this
is interrupted. Exit status: 0 every mutant was found, 1 one was not, 2 it could not be run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import entitlement

from llamamem.errors import LlamamemError
from llamamem.native.build import builds

ROOT = Path(__file__).resolve().parents[1]
CHECKS = 2000


@dataclass(frozen=True)
class Mutant:
    """`old` stands once in `file` and becomes `new`; the first of the profiles that is red is enough."""

    name: str
    undoes: str
    file: str
    old: str
    new: str
    profiles: tuple[str, ...] = ("batched", "fused")


MUTANTS: tuple[Mutant, ...] = ()


@contextmanager
def applied(mutant: Mutant) -> Iterator[None]:
    path = ROOT / mutant.file
    before = path.read_text()
    if before.count(mutant.old) != 1:
        raise LlamamemError(
            f"{mutant.name}: its text stands {before.count(mutant.old)} times in {mutant.file}, not once"
        )
    try:
        path.write_text(before.replace(mutant.old, mutant.new))
        yield
    finally:
        path.write_text(before)


def compiled(build: Path) -> None:
    line = ["ninja", "-C", str(build), "llama-server"]
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode != 0:
        raise LlamamemError(f"it does not compile: {done.stdout[-600:]}")


def found_by(mutant: Mutant, bin_dir: Path, seed: int) -> str:
    """What was wrong first and after how many checks; nothing when all was right."""
    for profile in mutant.profiles:
        with tempfile.TemporaryDirectory(prefix="llamamem-mutant-") as name:
            proof = entitlement.prove(profile, seed, CHECKS, Path(name), bin_dir=bin_dir)
        if proof.fault is not None:
            return f"{profile}, check {proof.tally.checks}: {proof.fault.what[:110]}"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="beginnings of names; all, if none is given")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    chosen = [one for one in MUTANTS if not args.names or one.name.startswith(tuple(args.names))]
    made = [build for build in builds() if build.backend == "cpu"]
    if not made or not chosen:
        raise LlamamemError("no build here: run `llamamem build`" if chosen else "no mutant has such a name")
    root, missed = made[0].root, []
    try:
        for mutant in chosen:
            with applied(mutant):
                compiled(root)
                what = found_by(mutant, made[0].bin_dir, args.seed)
            print(f"{'found ' if what else 'MISSED'}  {mutant.name:<28} {mutant.undoes}\n{'':8}{what}", flush=True)
            missed += [] if what else [mutant.name]
    finally:
        compiled(root)  # of the sources as they were
    print(f"{len(chosen)} mutants, {len(missed)} not found{': ' if missed else ''}{', '.join(missed)}")
    return 1 if missed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (LlamamemError, RuntimeError) as e:
        print(f"entitlement_mutants: {e}", file=sys.stderr)
        sys.exit(2)
