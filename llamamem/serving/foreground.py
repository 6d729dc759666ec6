"""A server in the foreground, from preflight to its last line: what `llamamem serve` does.

Exit statuses: 0 stopped on request, 1 the server ended by itself, 2 it could not start, 3 it had to be killed.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TextIO

from llamamem.formats.run import RunRecord
from llamamem.serving.preflight import Checked
from llamamem.serving.process import Server, launch
from llamamem.serving.profiles import Plan

STOPPED, ENDED, KILLED = 0, 1, 3

Say = Callable[[str], None]


class StopRequested(Exception):
    """A signal asked for the end while something was being waited for."""


class Signals:
    """While it is entered, SIGINT, SIGTERM and SIGHUP are noted instead of obeyed; `check` raises StopRequested.

    One that was ignored before stays so: `nohup` means it.
    """

    _NUMBERS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))

    def __init__(self) -> None:
        self.received: list[int] = []
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        for number in self._NUMBERS:
            if signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)

    def check(self) -> None:
        if self.received:
            raise StopRequested

    def twice(self) -> bool:
        """Whoever asks again does not want to wait."""
        return len(self.received) > 1


class Follower:
    """Copies what is new in a log file to a stream each time it is called, as far as the stream takes it at once.

    A pipe that nobody reads must not keep us from stopping the server, so nothing waits for it: the log has it all.
    """

    def __init__(self, path: Path, out: TextIO | None = None) -> None:
        self._file = path.open("r", encoding="utf-8", errors="replace")
        self._out = out or sys.stderr
        self._pending = ""

    def __call__(self) -> None:
        self._pending = (self._pending + self._file.read())[-_BEHIND:]
        while self._pending and _takes(self._out):
            piece, self._pending = self._pending[:_PIECE], self._pending[_PIECE:]
            with contextlib.suppress(OSError):  # a closed terminal is no reason to end
                self._out.write(piece)
                self._out.flush()

    def close(self) -> None:
        self()
        self._file.close()


_BEHIND = 1 << 20  # characters that a slow reader may be behind
_PIECE = 1024  # characters: whoever takes anything takes PIPE_BUF bytes at once


def _takes(out: TextIO, seconds: float = 0.0) -> bool:
    try:
        return bool(select.select([], [out], [], seconds)[1])
    except (OSError, ValueError):  # it is no file, or not open: writing says what is wrong
        return True


def serve_foreground(
    plan: Plan,
    checked: Checked,
    signals: Signals,
    *,
    build: str,
    name: str | None = None,
    stall_timeout: float = 300.0,
    grace: float = 10.0,
    on_ready: Callable[[RunRecord], None] = lambda record: None,
    say: Say | None = None,
) -> int:
    """Runs the server until a signal comes or it ends by itself; returns the exit status.

    Raises LlamamemError when it does not become ready. The server never outlives the call.
    """
    say = say or say_line
    server = launch(plan, checked, build=build, name=name, stops_on_signal=True)
    follow = Follower(server.log_path)
    disk = Disk(server, say)

    def between() -> None:
        follow()
        disk.look()
        if os.getpid() == 1:
            reap_strangers(server.process.pid)
        signals.check()

    ready = False
    try:
        server.wait_ready(stall_timeout=stall_timeout, api_key=_api_key(plan), on_wait=between)
        ready = True
        follow()
        on_ready(server.record)
        server.wait(between)
        follow()
        say(f"llamamem: the server ended by itself: it {server.how_it_ended}; log: {server.log_path}")
        return ENDED
    except StopRequested:
        ending = server.stop(grace, hurry=signals.twice)
        follow()
        when = "" if ready else ", before it was ready"
        if ending == "killed":
            say(f"llamamem: the server did not stop on request{when}, and was killed")
            return KILLED
        if ending == "exited":
            say(f"llamamem: the server ended by itself{when}: it {server.how_it_ended}; log: {server.log_path}")
            return ENDED
        say(f"llamamem: the server was stopped on request{when}")
        return STOPPED
    finally:
        server.stop(grace, hurry=signals.twice)
        follow.close()


def _api_key(plan: Plan) -> str | None:
    """The first key that requests must carry, when llama-server was given one."""
    keys = os.environ.get("LLAMA_API_KEY")
    for arg, value in pairwise(plan.extra):
        if arg.replace("_", "-") == "--api-key":
            keys = value
    return keys.split(",")[0] if keys else None


class Disk:
    """Says once when nothing more fits where the log and the run record are; the server itself goes on."""

    def __init__(self, server: Server, say: Say) -> None:
        self._server = server
        self._say = say
        self._next = 0.0

    def look(self) -> None:
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + 1.0
        log = self._server.log_path
        with contextlib.suppress(OSError):
            if shutil.disk_usage(log.parent).free == 0 or self._server.unrecorded is not None:
                self._say(
                    f"llamamem: warning: {log}: no room is left there: the server goes on, but its log ends here, and"
                    " other commands may not find the run; make room"
                )
                self._next = float("inf")


def reap_strangers(own: int) -> None:
    """As the first process of a container we inherit every orphan in it; unreaped they would stay as zombies."""
    if not hasattr(os, "waitid"):
        return
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
            if ended.si_pid == own:  # its end is for whoever waits for it
                return
            os.waitpid(ended.si_pid, 0)


def say_line(line: str) -> None:
    if not _takes(sys.stderr, 1.0):
        return
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)
