"""Holds every kind of store to what `SessionStore` promises; the two servers are real, private and killed.

    python tools/store_conformance.py                     # the sizes of docs/stores.md
    python tools/store_conformance.py --kind valkey --only killed_server --kills 100

Prints a line a check, exits 1 if one failed. The servers are Debian's redis-server, or valkey-server, and postgresql.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace

from store_checks import CHECKS, SERVER_CHECKS, Size
from store_crashes import full_disk, killed_server, killed_writers
from store_places import KINDS, NoRoom, place_of


def checks_of(kind: str) -> list[str]:
    of_servers = [] if kind in ("directory", "sqlite") else [*SERVER_CHECKS, killed_server]
    return [check.__name__ for check in (*CHECKS, killed_writers, *of_servers, full_disk)]


def run_check(name: str, kind: str, size: Size, servers: Callable[..., object] | None = None) -> str:
    """What was seen. Raises AssertionError where the store fails it, NoRoom where the machine has no small disk."""
    if name == "full_disk":
        return full_disk(kind, size)
    check = {c.__name__: c for c in (*CHECKS, *SERVER_CHECKS, killed_server, killed_writers)}[name]
    with place_of(kind, servers) as place:  # type: ignore[arg-type]
        return check(place, size)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kind", action="append", choices=KINDS, help="again for each; else all")
    parser.add_argument("--only", action="append", metavar="CHECK")
    parser.add_argument("--writers", type=int, default=Size.writers)
    parser.add_argument("--contended", type=int, default=Size.contended, help="sessions that they write")
    parser.add_argument("--kills", type=int, default=Size.kills)
    parser.add_argument("--seed", type=int, default=Size.seed)
    args = parser.parse_args()
    size = replace(Size(), writers=args.writers, contended=args.contended, kills=args.kills, seed=args.seed)
    failed = 0
    for kind in args.kind or KINDS:
        for name in checks_of(kind):
            if args.only and name not in args.only:
                continue
            begun = time.monotonic()
            try:
                said = run_check(name, kind, size)
            except NoRoom as e:
                said = f"not run: {e}"
            except Exception as e:
                failed += 1
                said = f"FAILED: {e!r}"
                traceback.print_exc()
            print(f"{kind:10} {name:16} {time.monotonic() - begun:6.1f} s  {said}", flush=True)
    print(f"{failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
