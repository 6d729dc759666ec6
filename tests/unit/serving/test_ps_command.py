"""`llamamem ps`, `logs` and `stop` on several named runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest
from launched import LLAMAMEM, Launched, gone, launched, records, until

from llamamem.formats.run import RunRecord, read_run, runs_dir, write_run
from llamamem.serving.process import launch
from llamamem.serving.profiles import make_plan
from llamamem.serving.runs import prune_runs, stop_run

Run = Callable[..., Any]
Start = Callable[..., Launched]


@pytest.fixture
def start(fake_bin: Path, base: Path, tmp_path: Path) -> Any:
    """`start("anna", "ok")`: a run of that name in front of the stand-in."""
    with ExitStack() as stack:

        def run(name: str, mode: str = "ok", *more: str) -> Launched:
            line = ["--model", str(base), "--bin-dir", str(fake_bin), "--port", "0", "--name", name, *more]
            return stack.enter_context(launched([*line, "--", "--fake", mode], tmp_path / f"{name}.talk"))

        yield run


def sleeper() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])


def record_of(process: int, run_id: str = "20260101-000000-aaaaaa", **fields: Any) -> RunRecord:
    """A record that says that this process is the server, and the launcher too."""
    given = {
        "run_id": run_id,
        "state": "ready",
        "pid": process,
        "create_time": psutil.Process(process).create_time(),
        "launcher_pid": process,
        "launcher_create_time": psutil.Process(process).create_time(),
        "host": "127.0.0.1",
        "port": 1,
        "url": "http://127.0.0.1:1",
        "profile": "base",
        "model": "/m/base.gguf",
        "log": str(runs_dir() / f"{run_id}.log"),
        "argv": [],
        "started": time.time(),
        **fields,
    }
    record = RunRecord(**given)
    write_run(record, runs_dir() / f"{run_id}.json")
    return record


def test_several_runs_by_name(start: Start, llamamem: Run) -> None:
    anna = start("anna")
    first = anna.ready()
    bert = start("bert", "late")
    second = bert.loading()
    listed = json.loads(llamamem("ps", "--json").out)["runs"]
    assert [(run["name"], run["state"]) for run in listed] == [("anna", "ready"), ("bert", "starting")]
    table = llamamem("ps").out
    assert table.count("\n") == 3 and first["url"] in table and "anna" in table and "bert" in table

    done = llamamem("stop")
    assert done.status == 2 and "2 servers run" in done.err
    done = llamamem("stop", "carl")
    assert done.status == 2 and "no such server runs (running: anna, bert)" in done.err

    done = llamamem("stop", "anna")
    assert (done.status, done.out, done.err) == (0, "", "llamamem: anna was stopped\n")
    assert anna.end() == (0, "llamamem: the server was stopped on request") and gone(first["pid"])
    assert not gone(second["pid"])
    done = llamamem("stop", "--run", second["run_id"][:12], "--json")
    assert json.loads(done.out) == {"runs": [{"run_id": second["run_id"], "name": "bert", "ending": "stopped"}]}
    assert bert.end()[0] == 0 and gone(second["pid"])

    assert llamamem("ps").out == "" and json.loads(llamamem("ps", "--json").out) == {"runs": []}
    states = [(run["name"], run["state"]) for run in json.loads(llamamem("ps", "--all", "--json").out)["runs"]]
    assert states == [("anna", "stopped"), ("bert", "stopped")]


def test_a_name_is_taken_by_one_live_run(start: Start) -> None:
    start("anna").ready()
    second = start("anna")  # its own talk overwrites the first one's, which is read no more
    status, line = second.end()
    assert status == 2 and line.startswith("llamamem: error: --name anna: a server of that name runs at http://")
    assert len(records()) == 1


def test_a_name_that_is_none(start: Start) -> None:
    status, line = start("../x").end()
    assert status == 2 and "--name ../x: give up to 64 letters" in line and not runs_dir().exists()


def test_stop_of_all_kills_the_stubborn(start: Start, llamamem: Run) -> None:
    easy = start("easy")
    pids = [easy.ready()["pid"]]
    hard = start("hard", "stubborn", "--grace", "600")
    pids.append(hard.ready()["pid"])
    done = llamamem("stop", "--all", "--grace", "5")
    assert done.status == 3 and done.err == "llamamem: easy was stopped\nllamamem: hard was killed\n"
    assert all(map(gone, pids)) and hard.end()[0] == 3


def test_stop_leaves_a_program_that_serves_by_itself_alone(fake_bin: Path, llamamem: Run) -> None:
    """Only `llamamem serve` stops its server when it is signalled; this very test would die of SIGTERM."""
    plan = make_plan(Path("b.gguf"), bin_dir=fake_bin, port=0, environ={})
    with launch(plan, name="mine") as server:
        server.wait_ready(stall_timeout=20)
        assert llamamem("stop", "mine").status == 0
        assert server.wait() == -signal.SIGTERM
    assert read_run(server.record_path).state == "exited"


@pytest.mark.parametrize("launcher_stops", [False, True])
def test_a_reused_pid_is_never_signalled(llamamem: Run, launcher_stops: bool) -> None:
    with sleeper() as innocent:
        early = psutil.Process(innocent.pid).create_time() - 60
        times = {"create_time": early, "launcher_create_time": early, "launcher_stops": launcher_stops}
        record = record_of(innocent.pid, name="anna", **times)
        assert llamamem("stop", "anna").status == 2
        assert stop_run(record) == "gone"
        assert innocent.poll() is None
        innocent.kill()


def test_a_reused_pid_of_the_launcher_is_not_signalled_and_the_server_is_stopped(llamamem: Run) -> None:
    with sleeper() as innocent, subprocess.Popen(["sleep", "60"], start_new_session=True) as server:
        early = psutil.Process(innocent.pid).create_time() - 60
        record_of(server.pid, launcher_pid=innocent.pid, launcher_create_time=early, launcher_stops=True)
        assert llamamem("stop").status == 0
        assert server.wait(20) == -signal.SIGTERM and innocent.poll() is None
        assert records()[0]["state"] == "stopped" and records()[0]["ended"]
        innocent.kill()


def test_logs(start: Start, llamamem: Run) -> None:
    assert "no server was started yet" in llamamem("logs").err
    launcher = start("anna", "slow")
    run = launcher.ready()
    whole = Path(run["log"]).read_text()
    assert whole.startswith(f"llamamem: run {run['run_id']}\n")
    assert llamamem("logs").out == whole == llamamem("logs", "anna").out
    assert llamamem("logs", "-n", "2").out == "loading 14\nfake: listening\n"
    launcher.process.terminate()
    launcher.end()
    assert llamamem("logs", "--run", "anna").out == whole  # also of a run that is over
    done = llamamem("logs", "bert")
    assert done.status == 2 and "--run bert: no such run" in done.err
    Path(run["log"]).unlink()
    done = llamamem("logs", "anna")
    assert done.status == 2 and "the log of anna cannot be read" in done.err


def test_logs_are_followed_to_the_end_of_the_run(start: Start, tmp_path: Path) -> None:
    launcher = start("anna", "late")
    launcher.loading()
    with (tmp_path / "followed").open("w") as out:
        follower = subprocess.Popen([*LLAMAMEM, "logs", "-f", "anna"], stdout=out)
    until(lambda: "loading" in (tmp_path / "followed").read_text())
    (tmp_path / "gate").touch()
    run = launcher.ready()
    until(lambda: "fake: listening" in (tmp_path / "followed").read_text())
    assert follower.poll() is None
    launcher.process.terminate()
    launcher.end()
    assert follower.wait(60) == 0
    assert (tmp_path / "followed").read_text() == Path(run["log"]).read_text()


def test_old_runs_are_pruned_and_live_ones_are_not() -> None:
    runs_dir().mkdir(parents=True)
    record_of(os.getpid(), "20250101-000000-alive0", started=0.0)
    for i in range(5):
        record_of(os.getpid(), f"20260101-00000{i}-aaaaaa", started=1.0 + i, state="stopped", ended=2.0 + i)
        (runs_dir() / f"20260101-00000{i}-aaaaaa.log").touch()
    stale = runs_dir() / ".x.json.1"
    stale.touch()
    os.utime(stale, (1, 1))
    prune_runs(runs_dir(), keep=2)
    assert [run["run_id"] for run in records()] == [
        "20250101-000000-alive0",
        "20260101-000003-aaaaaa",
        "20260101-000004-aaaaaa",
    ]
    assert len(list(runs_dir().glob("*.log"))) == 2 and not stale.exists()
