"""`llamamem health` as a user sees it: statuses, what goes to stdout, the file, the watch."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
from lying_server import LyingServer

from llamamem.formats.health import CHECK_IDS, health_fault
from llamamem.formats.run import RunRecord, runs_dir, write_run

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def own_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("llamamem.proof.health.log._LATE", 0.2)


@pytest.fixture
def server(tmp_path: Path, model_a: Path) -> Iterator[LyingServer]:
    files = [Path(shutil.copy(model_a / name, tmp_path)) for name in ("model-f32.gguf", "sidecar-v1.gguf")]
    with LyingServer(tmp_path, *files) as server:
        yield server


def record(server: LyingServer) -> RunRecord:
    """As `llamamem serve` would have written it; the process is this one."""
    run = RunRecord(
        run_id=server.run_id,
        name="toy",
        state="ready",
        pid=os.getpid(),
        create_time=psutil.Process().create_time(),
        launcher_pid=os.getpid(),
        host="127.0.0.1",
        port=int(server.url.rpartition(":")[2]),
        url=server.url,
        profile="serial",
        model=str(server.model),
        base_sha256=server.identity.base_sha256,
        sidecar=str(server.sidecar.path),
        sidecar_sha256=server.identity.sidecar_sha256,
        slot_dir=str(server.slot_dir),
        log=str(server.log),
        argv=["llama-server", "--parallel", "1"],
        started=time.time() - 60,
    )
    write_run(run, runs_dir() / f"{run.run_id}.json")
    return run


def test_the_only_run_is_checked_and_the_result_is_data(server: LyingServer, llamamem: Run) -> None:
    record(server)
    status, out, err = llamamem("health", "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert list(found) == ["ok", "run_id", "timestamp", "url", "model", "base", "sidecar", "log", "checks"]
    assert found["ok"] and found["run_id"] == server.run_id and found["url"] == server.url
    assert found["base"] == {"path": str(server.model), "sha256": server.identity.base_sha256}
    assert [check["id"] for check in found["checks"]] == list(CHECK_IDS)
    assert all(list(check) == ["id", "ok", "detail", "hint", "ms"] for check in found["checks"])


def test_a_table_names_the_failed_check_and_the_next_step(server: LyingServer, llamamem: Run) -> None:
    record(server)
    server.lies.add("disconnected")
    status, out, err = llamamem("health", "--run", "toy")
    assert (status, err) == (1, "")
    lines = out.splitlines()
    assert lines[0].startswith("1 of 12 checks fail") and len(lines) == 13
    assert [line.split()[1] for line in lines[1:] if line.startswith("FAIL")] == ["causal"]
    assert "->" in lines[-1] and "\x1b" not in out


def test_a_server_without_a_record_is_told_by_its_files(server: LyingServer, llamamem: Run) -> None:
    url = ("health", "--url", server.url + "/")
    files = ("--model", server.model, "--sidecar", server.sidecar.path, "--log", server.log)
    assert llamamem(*url, *files, "--slot-dir", server.slot_dir)[0] == 0
    status, out, _ = llamamem(*url, "--json")
    assert status == 1
    hints = {check["id"]: check["hint"] for check in json.loads(out)["checks"] if not check["ok"]}
    assert hints["binding"] == "give --sidecar SIDECAR.gguf" and hints["log"] == "give --log FILE"
    assert hints["slot_roundtrip"] == "give --slot-dir" and "causal" not in hints, "which needs no file"
    record(server)  # with one nothing else is needed
    assert llamamem(*url)[0] == 0


def test_the_file_is_a_gate_until_the_server_is_gone(server: LyingServer, llamamem: Run, tmp_path: Path) -> None:
    run, path = record(server), tmp_path / "health.json"
    status, out, _ = llamamem("health", "--json", "--output", path)
    assert status == 0 and json.loads(out) == json.loads(path.read_text())
    assert health_fault(path, run, max_age=timedelta(minutes=1)) is None
    server.lies.add("silent")
    assert llamamem("health", "--output", path)[0] == 1
    assert "failed chat" in (health_fault(path, run, max_age=timedelta(minutes=1)) or "")
    server.lies = {"500 in /health"}
    status, out, err = llamamem("health", "--output", path)
    assert (status, out) == (2, "") and "answered 500" in err
    assert not path.exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "no server runs"),
        (("--run", "nobody"), "no such server runs"),
        (("--run", "a", "--url", "http://127.0.0.1:1"), "give one of them"),
        (("--url", "http://127.0.0.1:1"), "is the server running?"),
        (("--output", "notes.txt"), "not a health report"),
    ],
)
def test_what_cannot_be_run_is_one_line_and_status_2(
    llamamem: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    status, out, err = llamamem("health", *arguments)
    assert (status, out) == (2, "") and said in err and err.count("\n") == 1
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_watch_reports_again_and_again_until_it_is_interrupted(server: LyingServer, llamamem: Run) -> None:
    record(server)
    props = server.props

    def count() -> dict[str, object]:  # the second report differs, the third one is interrupted
        asked = server.asked.count("/props")
        if asked == 2:
            server.lies.add("silent")
        if asked == 3:
            threading.Thread(target=signal.raise_signal, args=(signal.SIGINT,)).start()
            server.hold.wait(5)
        return props()

    server.props = count  # type: ignore[method-assign]
    status, out, err = llamamem("health", "--watch", "0", "--json")
    reports = [json.loads(line) for line in out.splitlines()]
    assert [report["ok"] for report in reports] == [True, False]
    assert status == 1 and err == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_however_it_is_ended_the_conversation_is_put_back(server: LyingServer, number: signal.Signals) -> None:
    """The only slot has somebody's conversation in it."""
    run = record(server)
    server.complete({"id_slot": 0, "prompt": [2, 50, 51, 52], "n_predict": 3})
    before = list(server.slots[0].text)
    moved = threading.Event()
    complete = server.complete

    def slow(body: dict[str, object]) -> dict[str, object]:
        with server.working:
            if server.slots[0].text != before:
                moved.set()
                time.sleep(0.2)
            return complete(body)

    server.complete = slow  # type: ignore[method-assign]
    command = [sys.executable, "-m", "llamamem.cli", "health", "--run", run.run_id]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as health:
        assert moved.wait(60)
        health.send_signal(number)
        _, err = health.communicate(timeout=60)
    assert health.returncode == 128 + number and "Traceback" not in err
    assert server.slots[0].text == before and list(server.slot_dir.iterdir()) == []
