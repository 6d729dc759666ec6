"""The real server in what a launcher must survive: exit status, last line, nothing left behind.

The stand-in of tests/unit/serving goes through the whole list; here is what depends on how llama-server itself behaves.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import psutil
import pytest
from launched import can_unshare, free_port, gone, launched, records, until

from llamamem.native.build import Build

SOAK = Path(__file__).parents[2] / "tools" / "soak.py"


@pytest.fixture
def command(model: Path, sidecar: Path) -> list[str]:
    return ["--model", str(model), "--sidecar", str(sidecar), "--ctx-size", "4096"]


@pytest.fixture
def gated(build: Build, tmp_path: Path) -> list[str]:
    """A bin directory whose llama-server waits for the file `gate`, then becomes the real one."""
    directory = tmp_path / "bin"
    directory.mkdir()
    real = Path(build.bin_dir) / "llama-server"
    script = f"""#!/bin/sh
case "$*" in *--version*) exec {real} "$@" ;; esac
echo waiting
while [ ! -e {tmp_path}/gate ]; do sleep 0.05; done
exec {real} "$@"
"""
    (directory / "llama-server").write_text(script)
    (directory / "llama-server").chmod(0o755)
    return ["--bin-dir", str(directory)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_while_it_generates(command: list[str], tmp_path: Path, number: int) -> None:
    port = free_port()
    with launched([*command, "--port", str(port), "--", "--threads", "1"], tmp_path / "talk") as launcher:
        run = launcher.ready()
        body = {"prompt": "hello", "n_predict": 3000, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{run['url']}/completion", json=body, timeout=60, trust_env=False) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
            launcher.process.send_signal(number)
            with pytest.raises((httpx.HTTPError, StopIteration)):
                while True:
                    assert '"stop":true' not in next(lines), "it was not stopped, it had finished"
        if number == signal.SIGKILL:
            assert launcher.process.wait(60) == -signal.SIGKILL
        else:
            assert launcher.end() == (0, "llamamem: the server was stopped on request")
    until(lambda: gone(run["pid"]))
    with ThreadingHTTPServer(("127.0.0.1", port), BaseHTTPRequestHandler):
        pass
    assert records()[0]["state"] == ("ready" if number == signal.SIGKILL else "stopped")


def test_ctrl_c_while_it_loads(command: list[str], tmp_path: Path) -> None:
    with launched([*command, "--port", "0"], tmp_path / "talk") as launcher:
        run = launcher.loading()
        launcher.process.send_signal(signal.SIGINT)
        status, line = launcher.end()
    assert status == 0 and line.startswith("llamamem: the server was stopped on request") and gone(run["pid"])


def test_sigkill_of_the_server(command: list[str], tmp_path: Path) -> None:
    with launched([*command, "--port", "0"], tmp_path / "talk") as launcher:
        run = launcher.ready()
        os.kill(run["pid"], signal.SIGKILL)
        status, line = launcher.end()
    assert status == 1 and "the server ended by itself: it was ended by SIGKILL" in line and run["log"] in line


@pytest.fixture
def thief() -> Iterator[tuple[int, Callable[[], None]]]:
    """A port, and what takes it and answers there as a server would."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps({"status": "ok", "data": [{"id": "thief"}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    port = free_port()
    servers: list[ThreadingHTTPServer] = []

    def take() -> None:
        servers.append(ThreadingHTTPServer(("127.0.0.1", port), Handler))
        threading.Thread(target=servers[0].serve_forever, daemon=True).start()

    yield port, take
    for server in servers:
        server.shutdown()
        server.server_close()


def test_port_stolen_between_check_and_bind(
    command: list[str], gated: list[str], thief: tuple[int, Callable[[], None]], tmp_path: Path
) -> None:
    port, take = thief
    with launched([*command, *gated, "--port", str(port)], tmp_path / "talk") as launcher:
        run = launcher.loading()
        take()
        (tmp_path / "gate").touch()
        status, line = launcher.end()
    assert status == 2 and line.startswith("llamamem: error: llama-server exited with status 1 before it was ready")
    assert f"--port {port}: taken by " in line and f"(pid {os.getpid()})" in line and gone(run["pid"])


def test_model_removed_while_loading(sidecar: Path, model: Path, gated: list[str], tmp_path: Path) -> None:
    copy = tmp_path / "model.gguf"
    copy.write_bytes(model.read_bytes())
    line = ["--model", str(copy), "--sidecar", str(sidecar), *gated, "--port", "0"]
    with launched(line, tmp_path / "talk") as launcher:
        run = launcher.loading()
        copy.unlink()
        (tmp_path / "gate").touch()
        status, last = launcher.end()
    assert status == 2 and str(copy) in last and run["log"] in last and gone(run["pid"])


def test_a_disk_that_gets_full_while_it_serves(command: list[str], tmp_path: Path) -> None:
    if not can_unshare("-rm"):
        pytest.skip("no mount namespaces here")
    state = Path(os.environ["XDG_STATE_HOME"])
    state.mkdir()
    before = ["unshare", "-rm", "sh", "-c", f'mount -t tmpfs -o size=256k none {state} && exec "$@"', "sh"]
    with launched([*command, "--port", "0", "--", "--threads", "1"], tmp_path / "talk", before=before) as launcher:
        run = launcher.ready()
        with pytest.raises(OSError), Path(f"/proc/{launcher.process.pid}/root/{state}/full").open("wb", 0) as file:
            while file.write(bytes(4096)):
                pass
        until(lambda: "no room is left there" in launcher.said())
        for _ in range(3):  # it has nowhere to log to, and answers
            answer = httpx.post(f"{run['url']}/completion", json={"prompt": "hello", "n_predict": 4}, trust_env=False)
            assert answer.status_code == 200
        launcher.process.terminate()
        assert launcher.end() == (0, "llamamem: the server was stopped on request")
    assert gone(run["pid"])


def test_a_launcher_that_is_pid_1(command: list[str], tmp_path: Path) -> None:
    if not can_unshare("-rpf"):
        pytest.skip("no pid namespaces here")
    before = ["unshare", "-rpf", "--mount-proc"]
    with launched([*command, "--port", "0"], tmp_path / "talk", before=before) as launcher:
        assert launcher.ready()["launcher_pid"] == 1
        (first,) = psutil.Process(launcher.process.pid).children()
        (server,) = first.children()
        first.kill()
        launcher.process.wait(60)
        until(lambda: gone(server.pid))


def test_a_small_soak(model: Path, sidecar: Path) -> None:
    """tools/soak.py: each ending once, and requests of each kind; the full figures are in its own run."""
    line = [sys.executable, str(SOAK), "--model", str(model), "--sidecar", str(sidecar)]
    done = subprocess.run([*line, "--cycles", "7", "--requests", "150"], capture_output=True, text=True, timeout=600)
    report = json.loads(done.stdout)
    assert done.returncode == 0 and report["ok"], report["faults"]
    assert len(report["cycles"]["endings"]) == 7 and report["cycles"]["processes_left"] == 0
    assert len(report["requests"]["kinds"]) == 7
