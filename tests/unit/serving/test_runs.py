"""Running servers are found by their records."""

from __future__ import annotations

import os
import time
from typing import Any

import psutil
import pytest

from llamamem.errors import LlamamemError
from llamamem.formats.run import RunRecord, runs_dir, write_run
from llamamem.serving.runs import find_run, live_runs


def record(run_id: str, **fields: Any) -> RunRecord:
    """Of this very process, which is alive."""
    given: dict[str, Any] = {
        "run_id": run_id,
        "state": "ready",
        "pid": os.getpid(),
        "create_time": psutil.Process().create_time(),
        "launcher_pid": os.getpid(),
        "host": "127.0.0.1",
        "port": 1,
        "url": "http://127.0.0.1:1",
        "profile": "serial",
        "model": "base.gguf",
        "log": "log",
        "argv": [],
        "started": time.time(),
    }
    made = RunRecord(**{**given, **fields})
    write_run(made, runs_dir() / f"{run_id}.json")
    return made


def test_the_only_server_needs_no_name() -> None:
    with pytest.raises(LlamamemError, match=r"no server runs.*llamamem serve.*--url"):
        find_run()
    mine = record("20260101-000000-aaaaaa")
    record("20260101-000000-bbbbbb", state="stopped")
    assert find_run() == mine == find_run("20260101-000000-a")


def test_of_several_one_is_named() -> None:
    first, second = record("20260101-000000-aaaaaa"), record("20260102-000000-bbbbbb", url="http://127.0.0.1:2")
    assert live_runs() == [first, second]
    assert find_run("20260102") == second
    with pytest.raises(LlamamemError, match=r"2 servers run: .*aaaaaa at .*bbbbbb at http://127.0.0.1:2; .*--run"):
        find_run()
    with pytest.raises(LlamamemError, match=r"--run 2027: no such server.*aaaaaa.*bbbbbb"):
        find_run("2027")


def test_a_pid_that_went_to_another_process_is_no_server() -> None:
    record("20260101-000000-aaaaaa", create_time=psutil.Process().create_time() - 60)
    record("20260101-000000-bbbbbb", pid=2**22 + 1)
    record("20260101-000000-cccccc", state="starting")
    (runs_dir() / "20260101-000000-dddddd.json").write_text("{}")
    assert live_runs() == []
