"""`llamamem serve --sessions` with the demo model, as a process that may be killed."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil

START = 300.0  # seconds; a machine may have other things to do


class Served:
    """One gateway with its server, on a port that it keeps. `place` is for its log and records."""

    def __init__(
        self, store: str, place: Path, name: str, *options: str, environ: dict[str, str] | None = None
    ) -> None:
        self.store, self.name, self.options = store, name, options
        self.log = place / f"{name}.log"
        self._environ = {**os.environ, "XDG_STATE_HOME": str(place / name), "LLAMA_ARG_THREADS": "1", **(environ or {})}
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[str] | None = None

    def start(self, *, wait: bool = True) -> None:
        command = [sys.executable, "-m", "llamamem.cli", "serve", "--demo", "--sessions", self.store, "--json"]
        command += ["--port", str(self.port), "--name", self.name, *self.options]
        with self.log.open("a") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, text=True, env=self._environ
            )
        if wait:
            self.wait_ready()

    def wait_ready(self) -> None:
        until = time.monotonic() + START
        while time.monotonic() < until:
            try:
                if httpx.get(f"{self.url}/health", timeout=5, trust_env=False).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            if self._process is not None and self._process.poll() is not None:
                break
            time.sleep(0.05)
        raise RuntimeError(f"the gateway is not ready: {self.log.read_text()[-2000:]}")

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def server_pid(self) -> int | None:
        """Of its llama-server, while there is one."""
        try:
            found = psutil.Process(self.pid).children()
        except psutil.NoSuchProcess:
            return None
        return next((child.pid for child in found if "llama-server" in child.name()), None)

    def kill_server(self) -> None:
        """The gateway starts another one. Returns when it is gone: a request then meets none, and not one that dies."""
        if (pid := self.server_pid()) is not None:
            os.kill(pid, signal.SIGKILL)
            # its first thread is gone before the last one, and with that its socket
            with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError):
                while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE or len(os.listdir(f"/proc/{pid}/task")) > 1:
                    time.sleep(0.01)

    def kill(self) -> None:
        """Both, in the middle of whatever they do: the kernel ends the server with the gateway."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def restart(self) -> None:
        self.kill()
        self.start()

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self.kill()

    def wait(self) -> int:
        """Its exit status."""
        assert self._process is not None
        return self._process.wait(60)
