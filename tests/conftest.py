from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

# a job in the background of a shell starts with Ctrl-C ignored, one under nohup with SIGHUP, and what the tests start
# would inherit that
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Threads that wait spin: with more of them than idle processors a model of a megabyte takes minutes. Whatever starts
# here has one thread unless a test says otherwise, and those of a test that does sleep while they wait.
os.environ.setdefault("LLAMA_ARG_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

sys.path.append(str(Path(__file__).parents[1] / "tools"))  # tests compose broken sidecars as the corpus' tool does


class Result(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def llamamem(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Runs the command line as a user does, in this process."""

    def run(*args: str | Path) -> Result:
        from llamamem.cli import main

        monkeypatch.setattr(sys, "argv", ["llamamem", *map(str, args)])
        try:
            main()
            status = 0
        except SystemExit as e:
            status = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
        out, err = capsys.readouterr()
        return Result(status, out, err)

    return run
