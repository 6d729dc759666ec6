from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from llamamem.errors import LlamamemError
from llamamem.formats.run import read_run
from llamamem.serving.client import Client
from llamamem.serving.process import Server, launch
from llamamem.serving.profiles import make_plan


def start(fake_bin: Path, mode: str, tmp_path: Path) -> Server:
    plan = make_plan(Path("base.gguf"), bin_dir=fake_bin, port=0, extra=["--fake", mode], environ={})
    return launch(plan, directory=tmp_path / "runs")


def test_ready_then_stopped_in_order_and_recorded(fake_bin: Path, tmp_path: Path) -> None:
    with start(fake_bin, "ok", tmp_path) as server:
        server.wait_ready(stall_timeout=20)
        record = read_run(server.record_path)
        assert record.state == "ready" and record.port > 0 and record.url == server.url
        assert abs(psutil.Process(record.pid).create_time() - record.create_time) < 0.01
        assert os.getpgid(record.pid) == record.pid != os.getpgid(0)
        with Client(server.url) as client:
            assert client.models() == ["fake"]
        assert server.stop() == "stopped"
    record = read_run(server.record_path)
    assert record.state == "stopped" and record.ended is not None
    for path in (server.record_path, server.log_path, server.log_path.parent):
        assert path.stat().st_mode & 0o077 == 0, path
    assert not psutil.pid_exists(record.pid)


def test_an_exit_before_readiness_shows_the_error_lines(fake_bin: Path, tmp_path: Path) -> None:
    server = start(fake_bin, "crash", tmp_path)
    with pytest.raises(LlamamemError, match=r"exited with status 1 .*tensor blk\.0\.x is missing") as caught:
        server.wait_ready(stall_timeout=20)
    assert str(server.log_path) in str(caught.value)
    assert read_run(server.record_path).state == "failed"


def test_silence_is_a_stall_and_the_server_is_stopped(fake_bin: Path, tmp_path: Path) -> None:
    server = start(fake_bin, "stall", tmp_path)
    with pytest.raises(LlamamemError, match="logged nothing for 1 s"):
        server.wait_ready(stall_timeout=1)
    assert server.process.poll() is not None
    assert read_run(server.record_path).state == "failed"


def test_progress_in_the_log_puts_the_stall_off(fake_bin: Path, tmp_path: Path) -> None:
    with start(fake_bin, "slow", tmp_path) as server:
        begun = time.monotonic()
        server.wait_ready(stall_timeout=1.2)
        assert time.monotonic() - begun > 1.3


def test_a_server_that_ignores_sigterm_is_killed(fake_bin: Path, tmp_path: Path) -> None:
    server = start(fake_bin, "stubborn", tmp_path)
    server.wait_ready(stall_timeout=20)
    assert server.stop(grace=0.3) == "killed"
    record = read_run(server.record_path)
    assert record.state == "killed" and record.exit_code == -signal.SIGKILL


def test_an_end_by_itself_is_told_from_a_stop(fake_bin: Path, tmp_path: Path) -> None:
    with start(fake_bin, "dies", tmp_path) as server:
        server.wait_ready(stall_timeout=20)
        assert server.wait() == 7
        assert server.stop() == "exited"
    assert read_run(server.record_path).state == "exited"


def test_no_orphan_survives_a_killed_launcher(fake_bin: Path, tmp_path: Path) -> None:
    script = textwrap.dedent(f"""
        import time
        from pathlib import Path
        from llamamem.serving.process import launch
        from llamamem.serving.profiles import make_plan
        plan = make_plan(Path("b.gguf"), bin_dir=Path({str(fake_bin)!r}), port=0, environ={{}})
        server = launch(plan, directory=Path({str(tmp_path)!r}))
        server.wait_ready(stall_timeout=20)
        print(server.process.pid, flush=True)
        time.sleep(60)
    """)
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        child = psutil.Process(int(launcher.stdout.readline()))
        launcher.kill()
    _, alive = psutil.wait_procs([child], timeout=5)
    assert not alive


def test_a_binary_that_cannot_run_is_named(tmp_path: Path) -> None:
    plan = make_plan(Path("b.gguf"), bin_dir=tmp_path, environ={})
    with pytest.raises(LlamamemError, match="llama-server: cannot start"):
        launch(plan, directory=tmp_path / "runs")


def test_a_record_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"pid": 1}')
    with pytest.raises(LlamamemError, match="not a run record"):
        read_run(path)
