"""`llamamem serve` as a process of its own, for the length of a block: what a user would start in another terminal."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from llamamem.errors import LlamamemError

LONGEST = 120.0  # seconds for any one step

# two threads wait for each other longer than the demo model has work for them
ONE_THREAD = ("--", "--threads", "1", "--threads-batch", "1")


@dataclass
class Served:
    """A server that is ready; `run` is its record."""

    process: subprocess.Popen[str]
    run: dict[str, Any]

    @property
    def url(self) -> str:
        return str(self.run["url"])

    def stop(self) -> int:
        """Stops it in order and returns the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(LONGEST)


@contextmanager
def served(arguments: Sequence[str], longest: float = LONGEST) -> Iterator[Served]:
    """Once it has printed its run, which may take it `longest` seconds. It never outlives the block."""
    with tempfile.TemporaryFile("w+", errors="replace") as talk:
        process = subprocess.Popen(
            [sys.executable, "-m", "llamamem.cli", "serve", "--json", *arguments],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=talk, text=True,
        )  # fmt: skip
        watchdog = threading.Timer(longest, process.terminate)
        watchdog.start()
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            watchdog.cancel()
            if not line:
                process.wait(LONGEST)
                talk.seek(0)
                last = [text.strip() for text in talk.read().splitlines() if text.strip()][-1:]
                raise LlamamemError(f"llamamem serve exited with {process.returncode}: {' '.join(last)}")
            yield Served(process, json.loads(line))
        finally:
            watchdog.cancel()
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
            if process.stdout is not None:
                process.stdout.close()
