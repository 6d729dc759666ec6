"""The results of an MQAR comparison: JSON Lines, one run a line, only ever appended to.

A comparison that was stopped goes on from here: a run whose line is there is not run again, one that was cut short is.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from llamamem.errors import LlamamemError
from llamamem.lab.mqar_plan import Preset, Run

FORMAT = "llamamem_mqar.v1"
_HEAD = b'{"format": "%s", ' % FORMAT.encode()

Line = dict[str, Any]


def read_lines(path: Path) -> list[Line]:
    """The runs of a file, of whatever plan. Raises LlamamemError; a torn last line is left out."""
    try:
        return _parse(path, path.read_bytes())[0]
    except OSError as e:
        raise LlamamemError(f"{path}: cannot be read ({e.strerror})") from None


def of_plan(lines: list[Line], preset: Preset) -> dict[str, Line]:
    """The runs by key that are of this plan and that it asks for."""
    wanted = {run.key for run in preset.runs()}
    return {line["run"]: line for line in lines if line["plan"] == preset.digest and line["run"] in wanted}


class Results:
    """The file of one comparison, its writer alone: `lines` are those that were there when it was opened.

    Raises LlamamemError when another process writes it, or when it holds anything but runs.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as e:
            raise LlamamemError(f"{path}: cannot be written ({e.strerror}); give another --output") from None
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with open(self._fd, "rb", closefd=False) as file:
                self.lines, whole = _parse(path, file.read())
            os.ftruncate(self._fd, whole)
        except OSError as e:
            os.close(self._fd)
            busy = isinstance(e, BlockingIOError)
            said = "another `llamamem lab mqar` writes it" if busy else f"cannot be written ({e.strerror})"
            raise LlamamemError(f"{path}: {said}; give another --output") from None
        except LlamamemError:
            os.close(self._fd)
            raise

    def __enter__(self) -> Results:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)

    def append(self, preset: Preset, run: Run, outcome: Line) -> Line:
        """Adds a run, with what says which it is."""
        m = run.mixer
        line = {
            "format": FORMAT, "preset": preset.name, "plan": preset.digest, "run": run.key,
            "arm": m.arm, "width": m.width, "heads": m.heads, "head": m.head, "states": m.states, "chunk": m.chunk,
            "lr": run.lr, "seed": run.seed, **outcome,
        }  # fmt: skip
        data = json.dumps(line).encode() + b"\n"
        try:
            while data:
                data = data[os.write(self._fd, data) :]
        except OSError as e:
            raise LlamamemError(f"{self.path}: cannot be written ({e.strerror}); make room, run again") from None
        self.lines.append(line)
        return line


def _parse(path: Path, data: bytes) -> tuple[list[Line], int]:
    """The runs, and the bytes of whole lines."""
    whole = data.rfind(b"\n") + 1
    torn = data[whole:]
    if not (torn.startswith(_HEAD) or _HEAD.startswith(torn)):
        raise LlamamemError(f"{path}: its last line is not a run of `llamamem lab mqar`; give another --output")
    lines = []
    for number, text in enumerate(data[:whole].split(b"\n")[:-1], 1):
        try:
            if not text.startswith(_HEAD):
                raise ValueError("it begins differently")
            line = json.loads(text)
            lines.append({**line, "run": str(line["run"]), "plan": str(line["plan"])})
        except (ValueError, KeyError) as e:
            raise LlamamemError(
                f"{path}: line {number} is not a run of `llamamem lab mqar` ({e}); give another --output"
            ) from None
    return lines, whole
