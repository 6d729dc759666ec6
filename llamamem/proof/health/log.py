"""The check of the log: every line of evidence, of this run, and one that only this server can have written now."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

from llamamem.errors import LlamamemError
from llamamem.proof.health.evidence import Evidence, Fails

_COLORS = re.compile(r"\x1b\[[0-9;]*m")
_LATE = 10.0  # seconds: the server writes its log in a thread of its own
_OF_THIS_RUN = "is it the log of this run alone, and did `llamamem serve` start the server?"


def log(e: Evidence) -> str:
    path = e.target.log
    if path is None:
        raise Fails("the log is not known", "give --log FILE")
    _ = e.memory
    _check_run(path, e.target.run_id)
    said = [line.partition("memory: ")[2] for line in _lines(path, 0) if "memory: " in line]
    wanted = _evidence(e)
    for pattern in wanted:
        if (n := sum(re.match(pattern, line) is not None for line in said)) != 1:
            raise Fails(f"{path}: {n or 'no'} line{'s' if n > 1 else ''} `memory: {pattern}`", _OF_THIS_RUN)
    _check_memory(e, next(line for line in said if line.startswith("memory active: ")))
    _check_slot_dir(e, next(line for line in said if line.startswith("slot save/restore enabled: ")))
    _check_rolled_back(e, path)
    return f"{len(wanted) + 1} lines of evidence in {path}"


def _evidence(e: Evidence) -> tuple[str, ...]:
    """How the lines begin, as regular expressions; there is one of each."""
    serial = e.profile == "serial"
    off, skipped = ("off", "skipped") if serial else ("(on|off)", "(done|skipped)")
    several = e.profile == "batched" and e.target.parallel != 1
    return (
        "memory active: ",
        r"(\d+ slots|one slot)$" if several else "one slot$",
        f"prompt cache {off}: ",
        f"context checkpoints {off}: ",
        f"warm-up {skipped}$",
        "slot save/restore enabled: ",
        "exact-prefix reuse: ",
    )


def _check_run(path: Path, run_id: str | None) -> None:
    """The launcher writes the first line before it starts the server."""
    first = next(_lines(path, 0), "")
    if run_id is not None and first != f"llamamem: run {run_id}":
        raise Fails(f"{path}: does not begin with this run, {run_id}, but with {first[:80]!r}", _OF_THIS_RUN)


def _check_memory(e: Evidence, line: str) -> None:
    said = dict(part.split("=", 1) for part in line.removeprefix("memory active: ").split() if "=" in part)
    sidecar, identity = e.sidecar, e.identity
    expected = {
        "rank": str(sidecar.rank),
        "states": str(sidecar.states),
        "chunk": str(sidecar.chunk),
        "semantics": str(sidecar.semantics),
        "mode": e.profile,
        "sidecar": identity.sidecar_sha256,
        "base": identity.base_sha256,
    }
    for name, value in expected.items():
        if said.get(name) != value:
            raise Fails(f"{e.target.log}: memory active with {name}={said.get(name)}, not {value}", _OF_THIS_RUN)
    if (layers := _numbers(said.get("layers", ""))) != [layer.layer for layer in sidecar.layers]:
        raise Fails(f"{e.target.log}: memory active in layers {layers}", _OF_THIS_RUN)


def _numbers(text: str) -> list[int]:
    """`0-2,5` as 0, 1, 2, 5."""
    numbers: list[int] = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def _check_slot_dir(e: Evidence, line: str) -> None:
    said, known = Path(line.removeprefix("slot save/restore enabled: ").strip()), e.target.slot_dir
    if known is not None and said.is_absolute() and said.resolve() != known.resolve():
        raise Fails(f"{e.target.log}: slots are saved in {said}, not in {known}", "give the right --slot-dir or --log")


def _check_rolled_back(e: Evidence, path: Path) -> None:
    """A restore that must fail names a file that nobody else ever named; its line can only come from this server."""
    missing = e.slot.file("missing.state")
    before = path.stat().st_size
    status, message = e.slot.try_restore(missing)
    if status != 400:
        raise Fails(f"the restore of a missing file was answered with {status} {message}, not refused")
    deadline = time.monotonic() + _LATE
    while not any("rolled back" in line and missing.name in line for line in _lines(path, before)):
        if time.monotonic() > deadline:
            raise Fails(
                f"{path}: no line `memory: slot {e.slot.id}: rolled back` after a restore was refused", _OF_THIS_RUN
            )
        time.sleep(0.02)


def _lines(path: Path, offset: int) -> Iterator[str]:
    """The lines behind `offset` bytes, without colors."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            for line in file:
                yield _COLORS.sub("", line.decode("utf-8", "replace")).rstrip("\r\n")
    except OSError as error:
        raise LlamamemError(
            f"{path}: cannot be read ({error.strerror}); give the server's own log with --log"
        ) from None
