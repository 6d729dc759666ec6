"""Replicas of the demo behind a front: Ray Serve, nginx or LiteLLM, with the files of configs/."""

from __future__ import annotations

import os
import re
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
from once.served import Served
from store_servers import free_port

FRONTS = ("ray", "nginx", "litellm")
ROOT = Path(__file__).resolve().parents[1]
START = 300.0  # seconds, on a busy machine


class Cluster:
    """`with Cluster("nginx", store, place, 3, ["llamamem"]) as cluster:`; all of it is ended with the block."""

    def __init__(
        self, front: str, store: str, place: Path, replicas: int, command: list[str], litellm: str = "litellm"
    ) -> None:
        self.front, self.place, self.n = front, place, replicas
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._environ = {**os.environ, "XDG_STATE_HOME": str(place), "LLAMA_ARG_THREADS": "1"}
        self._gateways: list[Served] = []
        self._ended = threading.Event()
        if front == "ray":
            self._command = [*command, "scale", "--demo", "--store", store, "--port", str(self.port)]
            self._command += ["--replicas", str(replicas), "--lease", "5"]
        else:
            self._gateways = [Served(store, place, f"gateway-{i}", "--lease", "5") for i in range(replicas)]
            self._command = self._nginx() if front == "nginx" else self._litellm(litellm)

    def __enter__(self) -> Cluster:
        for gateway in self._gateways:
            gateway.start()
        with (self.place / "front.log").open("wb") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=log, cwd=self.place, env=self._environ, stdin=subprocess.DEVNULL
            )
        if self._gateways:
            self._keeper = threading.Thread(target=self._keep)
            self._keeper.start()
        until = time.monotonic() + START
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > until:
                raise RuntimeError((self.place / "front.log").read_text()[-3000:])
            time.sleep(0.2)
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._gateways:
            self._keeper.join()
        of_ray = self._descendants()
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(60)
        for process in of_ray:
            with suppress(psutil.Error):
                process.kill()
        for gateway in self._gateways:
            gateway.stop()

    def replicas(self) -> list[psutil.Process]:
        """Those that have a llama-server just now: each has a gateway too."""
        owners = []
        for process in self._descendants():
            with suppress(psutil.Error):
                if process.name() == "llama-server" and (parent := process.parent()) is not None:
                    owners.append(parent)
        return owners

    def busiest(self) -> psutil.Process:
        """The replica whose server has done most since this was asked last, or since its start."""
        before = dict(self._spent) if hasattr(self, "_spent") else {}
        self._spent = {}
        for owner in self.replicas():
            with suppress(psutil.Error):
                server = next(child for child in owner.children() if child.name() == "llama-server")
                times = server.cpu_times()
                self._spent[owner.pid] = times.user + times.system
        return psutil.Process(max(self._spent, key=lambda pid: self._spent[pid] - before.get(pid, 0.0)))

    def _descendants(self) -> list[psutil.Process]:
        found = []
        for pid in [self._process.pid, *(gateway.pid for gateway in self._gateways)]:
            with suppress(psutil.Error):
                found += psutil.Process(pid).children(recursive=True)
        return found

    def _keep(self) -> None:
        """Starts gateways again that were killed, as systemd would."""
        while not self._ended.wait(0.5):
            for gateway in self._gateways:
                if not psutil.pid_exists(gateway.pid) or psutil.Process(gateway.pid).status() == "zombie":
                    gateway.kill()
                    gateway.start(wait=False)

    @property
    def api(self) -> str:
        """Where sessions are told of: LiteLLM passes that on to nobody."""
        return self._gateways[0].url if self.front == "litellm" else self.url

    def _answers(self) -> bool:
        path = "/health/liveliness" if self.front == "litellm" else "/health"
        try:
            return httpx.get(f"{self.url}{path}", timeout=10, trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    def _nginx(self) -> list[str]:
        config = (ROOT / "configs" / "nginx.conf").read_text()
        for i, gateway in enumerate(self._gateways):
            config = config.replace(f"127.0.0.1:{8081 + i} ", f"127.0.0.1:{gateway.port} ")
        config = re.sub(r"server 127\.0\.0\.1:808[1-9] .*\n", "", config)
        (self.place / "nginx.conf").write_text(config.replace("127.0.0.1:8080", f"127.0.0.1:{self.port}"))
        return ["nginx", "-c", str(self.place / "nginx.conf"), "-p", str(self.place), "-g", "daemon off;"]

    def _litellm(self, program: str) -> list[str]:
        config = (ROOT / "configs" / "litellm.yaml").read_text()
        for i, gateway in enumerate(self._gateways):
            config = config.replace(f"127.0.0.1:{8081 + i}/", f"127.0.0.1:{gateway.port}/")
        (self.place / "litellm.yaml").write_text(config)
        return [program, "--config", str(self.place / "litellm.yaml"), "--port", str(self.port), "--host", "127.0.0.1"]
