"""What a launcher must survive without an orphan: its exit status, its last line, and that nothing is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
from fake_llama_server import Handler
from launched import LLAMAMEM, Launched, can_unshare, free_port, gone, launched, records, until

from llamamem.errors import LlamamemError
from llamamem.serving.process import launch
from llamamem.serving.profiles import make_plan
from llamamem.serving.runs import live_runs


@pytest.fixture
def command(fake_bin: Path, base: Path) -> list[str]:
    return ["--model", str(base), "--bin-dir", str(fake_bin)]


def fake(mode: str, port: int = 0) -> list[str]:
    return ["--port", str(port), "--", "--fake", mode]


def nothing_left(run: dict[str, object], port: int = 0) -> None:
    """No process of the run, nobody on its port, no run that seems to live, no temporary file."""
    until(lambda: gone(int(str(run["pid"]))))
    assert live_runs(starting=True) == []
    runs = Path(os.environ["XDG_STATE_HOME"]) / "llamamem" / "runs"
    assert {path.suffix for path in runs.iterdir() if path.name != ".lock"} <= {".json", ".log"}
    if port:
        with ThreadingHTTPServer(("127.0.0.1", port), Handler):
            pass


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_load(command: list[str], tmp_path: Path, number: int) -> None:
    with launched([*command, *fake("late")], tmp_path / "talk") as launcher:
        run = launcher.loading()
        assert run["state"] == "starting"
        launcher.process.send_signal(number)
        assert launcher.end() == (0, "llamamem: the server was stopped on request, before it was ready")
    nothing_left(run)
    assert records()[0]["state"] == "stopped"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_it_serves(command: list[str], tmp_path: Path, number: int) -> None:
    with launched([*command, *fake("ok", port := free_port())], tmp_path / "talk") as launcher:
        run = launcher.ready()
        launcher.process.send_signal(number)
        assert launcher.end() == (0, "llamamem: the server was stopped on request")
    nothing_left(run, port)
    assert records()[0]["state"] == "stopped"


def test_a_pipe_that_nobody_reads(command: list[str]) -> None:
    """Nothing waits for the reader: a signal still stops the server, and the log has every line."""
    line = [*LLAMAMEM, "serve", "--json", *command, *fake("chatty")]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        run = json.loads(launcher.stdout.readline())
        log = Path(run["log"])
        until(lambda: "fake: that was all\n" in log.read_text())
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(60) == 0
    nothing_left(run)
    assert log.stat().st_size > 1 << 20


def test_nohup_is_meant(command: list[str], tmp_path: Path) -> None:
    with launched([*command, *fake("ok")], tmp_path / "talk", before=["nohup"]) as launcher:
        run = launcher.ready()
        launcher.process.send_signal(signal.SIGHUP)
        launcher.process.send_signal(signal.SIGTERM)
        assert launcher.end()[0] == 0
    assert "stopped on request" in launcher.said() and gone(run["pid"])


@pytest.mark.parametrize("mode", ["late", "ok"])
def test_sigkill_of_the_launcher(command: list[str], tmp_path: Path, mode: str) -> None:
    with launched([*command, *fake(mode, port := free_port())], tmp_path / "talk") as launcher:
        run = launcher.loading() if mode == "late" else launcher.ready()
        launcher.process.kill()
        assert launcher.process.wait(60) == -signal.SIGKILL
    nothing_left(run, port)
    listed = subprocess.run([*LLAMAMEM_PS, "--all"], capture_output=True, text=True, timeout=60)
    assert "lost" in listed.stdout and run["run_id"] in listed.stdout


LLAMAMEM_PS = [sys.executable, "-m", "llamamem.cli", "ps"]


def test_sigkill_of_the_server(command: list[str], tmp_path: Path) -> None:
    with launched([*command, *fake("ok", port := free_port())], tmp_path / "talk") as launcher:
        run = launcher.ready()
        os.kill(run["pid"], signal.SIGKILL)
        status, line = launcher.end()
    assert status == 1
    assert line == f"llamamem: the server ended by itself: it was ended by SIGKILL; log: {run['log']}"
    nothing_left(run, port)
    assert records()[0]["state"] == "exited" and records()[0]["exit_code"] == -signal.SIGKILL


def test_sigkill_of_the_server_during_load(command: list[str], tmp_path: Path) -> None:
    with launched([*command, *fake("late")], tmp_path / "talk") as launcher:
        run = launcher.loading()
        os.kill(run["pid"], signal.SIGKILL)
        status, line = launcher.end()
    assert status == 2 and line.startswith("llamamem: error: llama-server was ended by SIGKILL before it was ready")
    nothing_left(run)


class Thief:
    """Takes the port in the gap between the check and the bind, and answers as a server would."""

    def __init__(self, port: int) -> None:
        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *args: object) -> None:
        self.server.shutdown()
        self.server.server_close()


def test_port_stolen_between_check_and_bind(command: list[str], tmp_path: Path) -> None:
    with launched([*command, *fake("late", port := free_port())], tmp_path / "talk") as launcher:
        run = launcher.loading()
        with Thief(port):
            (tmp_path / "gate").touch()
            status, line = launcher.end()
    assert status == 2 and "couldn't bind HTTP server socket" in line
    assert f"--port {port}: taken by " in line and f"(pid {os.getpid()})" in line
    nothing_left(run, port)
    assert launcher.process.stdout is None or launcher.process.returncode == 2


def test_another_server_on_the_port_is_not_taken_for_ours(fake_bin: Path, tmp_path: Path) -> None:
    """It answers /health and lists a model, but it is not the process that was started."""
    port, polls = free_port(), 0

    class Enough(Exception):
        pass

    def count() -> None:
        nonlocal polls
        polls += 1
        if polls > 10:
            raise Enough

    plan = make_plan(Path("b.gguf"), bin_dir=fake_bin, port=port, extra=["--fake", "deaf"], environ={})
    with Thief(port), launch(plan, directory=tmp_path / "runs") as server, pytest.raises(Enough):
        server.wait_ready(stall_timeout=60, on_wait=count)


def test_model_removed_while_loading(command: list[str], base: Path, tmp_path: Path) -> None:
    with launched([*command, *fake("unloads")], tmp_path / "talk") as launcher:
        status, line = launcher.end()
    assert status == 2 and f"failed to open {base}" in line
    nothing_left(records()[0])


# -- a disk that is full


def small_disk(tmp_path: Path) -> list[str]:
    """Puts the state directory on a file system of 64 kB, in a mount namespace of the command's own."""
    if not can_unshare("-rm"):
        pytest.skip("no mount namespaces here")
    state = tmp_path / "xdg_state_home"
    state.mkdir()
    return ["unshare", "-rm", "sh", "-c", f'mount -t tmpfs -o size=64k none {state} && exec "$@"', "sh"]


def test_a_disk_that_is_full_before_the_start(command: list[str], tmp_path: Path) -> None:
    before = small_disk(tmp_path)
    before[4] = before[4].replace("&& exec", "&& head -c 65536 /dev/zero > $XDG_STATE_HOME/full; exec")
    with launched([*command, *fake("ok")], tmp_path / "talk", before=before) as launcher:
        status, line = launcher.end()
    assert status == 2 and "cannot hold the log and record of a run (No space left on device)" in line
    assert not (tmp_path / "started").exists()


def test_a_disk_that_gets_full_while_it_serves(command: list[str], tmp_path: Path) -> None:
    """The server goes on, since those who talk to it have lost nothing; whoever looks is told."""
    with launched([*command, *fake("ok")], tmp_path / "talk", before=small_disk(tmp_path)) as launcher:
        run = launcher.ready()
        inside = Path(f"/proc/{launcher.process.pid}/root/{os.environ['XDG_STATE_HOME']}")
        with pytest.raises(OSError), (inside / "full").open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        until(lambda: "no room is left there" in launcher.said())
        assert launcher.process.poll() is None and not gone(run["pid"])
        launcher.process.terminate()
        assert launcher.end() == (0, "llamamem: the server was stopped on request")
    assert gone(run["pid"]) and launcher.said().count("no room is left") == 1


# -- the rest of the family


@pytest.mark.parametrize("ending", ["stop", "kill"])
def test_what_the_server_started_ends_with_it(command: list[str], tmp_path: Path, ending: str) -> None:
    with launched([*command, *fake("brood")], tmp_path / "talk") as launcher:
        run = launcher.ready()
        (child,) = psutil.Process(run["pid"]).children()
        if ending == "stop":
            launcher.process.terminate()
        else:
            os.kill(run["pid"], signal.SIGKILL)
        launcher.end()
        until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
    nothing_left(run)


def as_first_process(command: list[str], mode: str, tmp_path: Path) -> tuple[list[str], list[str], Path]:
    if not can_unshare("-rpf"):
        pytest.skip("no pid namespaces here")
    return [*command, *fake(mode)], ["unshare", "-rpf", "--mount-proc"], tmp_path / "talk"


def first_process(launcher: Launched) -> psutil.Process:
    (first,) = psutil.Process(launcher.process.pid).children()
    return first


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_launcher_that_is_pid_1_leaves_no_orphan(command: list[str], tmp_path: Path, number: int) -> None:
    line, before, talk = as_first_process(command, "ok", tmp_path)
    with launched(line, talk, before=before) as launcher:
        assert launcher.ready()["launcher_pid"] == 1
        first = first_process(launcher)
        servers = first.children()
        assert len(servers) == 1
        first.send_signal(number)
        launcher.process.wait(60)
        until(lambda: all(gone(process.pid) for process in servers))
        if number == signal.SIGTERM:
            assert launcher.end() == (0, "llamamem: the server was stopped on request")


def test_a_launcher_that_is_pid_1_leaves_no_zombie(command: list[str], tmp_path: Path) -> None:
    line, before, talk = as_first_process(command, "litter", tmp_path)
    with launched(line, talk, before=before) as launcher:
        launcher.ready()
        first = first_process(launcher)
        until(lambda: [child.name() for child in first.children()] == ["llama-server"])
        first.terminate()
        assert launcher.end()[0] == 0


def test_two_starts_with_one_name(fake_bin: Path, tmp_path: Path) -> None:
    plan = make_plan(Path("b.gguf"), bin_dir=fake_bin, port=0, environ={})
    with launch(plan, name="anna", directory=tmp_path) as first:
        with pytest.raises(LlamamemError, match="--name anna: a server of that name runs"):
            launch(plan, name="anna", directory=tmp_path)
        assert first.process.poll() is None
    launch(plan, name="anna", directory=tmp_path).stop()  # the name is free again
