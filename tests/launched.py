"""`llamamem serve` as a process of its own, as the tests of the launcher start, signal and examine it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

LLAMAMEM = [sys.executable, "-m", "llamamem.cli"]


def until(what: Callable[[], Any], timeout: float = 60.0) -> Any:
    """Polls until it is true, and returns it."""
    deadline = time.monotonic() + timeout
    while not (found := what()):
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)
    return found


def gone(pid: int) -> bool:
    """No such process, not even a zombie."""
    return not psutil.pid_exists(pid)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def can_unshare(flags: str) -> bool:
    """Whether this machine lets us make namespaces: some containers do not."""
    try:
        return subprocess.run(["unshare", flags, "true"], capture_output=True, timeout=30).returncode == 0
    except OSError:
        return False


def records(state: Path | None = None) -> list[dict[str, Any]]:
    """All run records, the oldest first."""
    runs = (state or Path(os.environ["XDG_STATE_HOME"])) / "llamamem" / "runs"
    return [json.loads(path.read_text()) for path in sorted(runs.glob("*.json"))]


@dataclass
class Launched:
    process: subprocess.Popen[str]
    talk: Path

    def ready(self) -> dict[str, Any]:
        """The run, once it is printed."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.said()
        run: dict[str, Any] = json.loads(line)
        return run

    def loading(self) -> dict[str, Any]:
        """The run as it is recorded before it is ready, with its first own line in the log."""
        run: dict[str, Any] = until(lambda: [r for r in records() if r["launcher_pid"] == self.process.pid])[0]
        until(lambda: Path(run["log"]).read_text().count("\n") > 1)
        return run

    def said(self) -> str:
        return self.talk.read_text(errors="replace")

    def end(self) -> tuple[int, str]:
        """Exit status and last line."""
        status = self.process.wait(60)
        said = self.said()
        assert "Traceback" not in said, said
        return status, said.splitlines()[-1] if said else ""


@contextmanager
def launched(command: list[str], talk: Path, *, before: list[str] | None = None) -> Iterator[Launched]:
    """`llamamem serve --json` with these arguments; it never outlives the block. `before` is put in front of it all."""
    line = [*(before or []), *LLAMAMEM, "serve", "--json", *command]
    with talk.open("w") as err:
        process = subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=err, text=True)
    try:
        yield Launched(process, talk)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
