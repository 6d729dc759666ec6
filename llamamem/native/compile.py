"""Run CMake and ninja with their output in a log file, progress on a terminal, and a failure that says why."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from llamamem.errors import LlamamemError

__all__ = ["failing_lines", "run_cmake", "run_ninja"]

_STEP = re.compile(r"^\[(\d+)/(\d+)\] (.*)")
_SHOWN = 20  # compiler lines of a failure
Step = Callable[[int, int, str], None]


def run_cmake(command: list[str], log: Path) -> None:
    """Configure; a failure is one line: the refusal that CMakeLists.txt wrote, else CMake's own first error."""
    with log.open("w", encoding="utf-8") as file:
        file.write(f"$ {' '.join(command)}\n")
        file.flush()
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, check=False)
    if done.returncode == 0:
        return
    refusal = log.parent / "llamamem-refusal.txt"
    if refusal.is_file():
        raise LlamamemError(f"{refusal.read_text(encoding='utf-8')} (log: {log})")
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    ours = [line.partition("llamamem: error: ")[2] for line in lines if line.startswith("llamamem: error: ")]
    first = next((n for n, line in enumerate(lines) if line.startswith("CMake Error")), len(lines) - 1)
    reason = ours[0] if ours else " ".join(lines[first : first + 4])
    raise LlamamemError(f"CMake failed: {reason} (log: {log})", exit_status=1)


def run_ninja(command: list[str], log: Path) -> None:
    """Build; on failure the failing compiler lines go to standard error, and the error names the log."""
    env = os.environ | {"NINJA_STATUS": "[%f/%t] ", "CLICOLOR_FORCE": "0"}
    started = time.monotonic()
    with log.open("w", encoding="utf-8", buffering=1) as file, _progress() as step:
        file.write(f"$ {' '.join(command)}\n")
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=env
        ) as process:
            assert process.stdout is not None
            for raw in process.stdout:
                line = raw.decode(errors="replace")
                file.write(line)
                if match := _STEP.match(line):
                    step(int(match[1]), int(match[2]), match[3])
    if process.returncode:
        for line in failing_lines(log.read_text(encoding="utf-8", errors="replace")):
            print(line, file=sys.stderr)
        took = time.monotonic() - started
        raise LlamamemError(f"the build failed after {took:.0f} s: see the lines above, full log: {log}", exit_status=1)


def failing_lines(text: str) -> list[str]:
    """What a person needs of ninja's output: each failed target and what the compiler said, without the commands."""
    shown: list[str] = []
    inside = skip = False
    for line in text.splitlines():
        if line.startswith("FAILED: "):
            inside, skip = True, True
            shown.append(re.sub(r"^FAILED: (\[code=\d+\] )?", "failed: ", line).strip())
        elif line.startswith(("[", "ninja: ")):
            inside = False
        elif inside and skip:
            skip = False  # the command line: pages long, and in the log
        elif inside and line.strip():
            shown.append(line)
    if not shown:
        shown = [line for line in text.splitlines() if line.strip()][-_SHOWN:]
    # the first error of many is the one to mend
    return shown[:_SHOWN] + ([f"... {len(shown) - _SHOWN} more lines in the log"] if len(shown) > _SHOWN else [])


@contextmanager
def _progress() -> Iterator[Step]:
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _sparse()
        return
    what_column = TextColumn("[dim]{task.fields[what]}")
    columns = (TextColumn("building"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), what_column)
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=None, what="")

        def step(done: int, total: int, what: str) -> None:
            progress.update(task, completed=done, total=total, what=what.rsplit("/", 1)[-1][:40])

        yield step


def _sparse() -> Step:
    """A line at every tenth of a build that takes a while: a log is read by people too."""
    shown = -1
    started = time.monotonic()

    def step(done: int, total: int, what: str) -> None:
        nonlocal shown
        tenth = 10 * done // total
        took = time.monotonic() - started
        if took > 5 and tenth != shown:
            shown = tenth
            print(f"llamamem: building {done}/{total} ({took:.0f} s)", file=sys.stderr, flush=True)

    return step
