"""HTTP on a socket of its own for each request, so that one can be begun, waited for, given up; and the server behind.

httpx would do for one request after another. Here several are under way at once in one thread, each in an order that
is ours: a request is on its way when `begin` returns.
"""

from __future__ import annotations

import json
import select
import shutil
import socket
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from llamamem.formats.demo_files import DemoFiles
from llamamem.serving.process import Server, launch
from llamamem.serving.profiles import make_plan

PATIENCE = 20.0  # seconds for any answer; a tiny model needs far less, so whoever takes longer waits for nothing


class NoAnswer(Exception):
    """The server hung up without an answer, or gave none in time."""


class Reply(NamedTuple):
    """An answer: its status and its JSON, or the objects of its stream."""

    status: int
    body: Any
    events: list[Any] | None = None

    @property
    def error(self) -> str:
        """The reason of a refusal, else nothing."""
        for found in (self.body, *(self.events or [])[-1:]):
            if isinstance(found, dict) and found.get("error"):
                error = found["error"]
                return str(error.get("message", error) if isinstance(error, dict) else error)
        return "" if self.status == 200 else f"status {self.status}"


class Pending:
    """A request that was sent."""

    def __init__(self, address: tuple[str, int], method: str, path: str, body: Any) -> None:
        data = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: {address[0]}\r\nConnection: close\r\nContent-Length: {len(data)}\r\n"
        self._received, self._ended, self._sent = b"", False, f"{method} {path}"
        try:
            self._socket = socket.create_connection(address, timeout=PATIENCE)
            self._socket.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + data)
        except OSError as e:
            raise NoAnswer(f"{self._sent}: {e}") from e

    def first(self) -> None:
        """Waits until the first piece of a stream is there."""
        while b"\ndata:" not in self._received and self._pump(PATIENCE):
            pass

    def events(self, n: int) -> None:
        """Waits until n pieces of a stream are there, or its end."""
        while self._received.count(b"\ndata:") < n and self._pump(PATIENCE):
            pass

    def ended(self) -> bool:
        """Whether all of the answer is here already."""
        while self._pump(0.0):
            pass
        return self._ended

    def result(self) -> Reply:
        while self._pump(PATIENCE):
            pass
        self.close()
        return self._parse()

    def close(self) -> None:
        """Hangs up, whatever was received."""
        self._socket.close()

    def _pump(self, timeout: float) -> bool:
        """Receives once; False when nothing more can come, or nothing came at once and no timeout is given."""
        if self._ended:
            return False
        if not select.select([self._socket], [], [], timeout)[0]:
            if timeout:
                self.close()
                raise NoAnswer(f"{self._sent}: no answer in {timeout:g} s")
            return False
        try:
            piece = self._socket.recv(1 << 16)
        except OSError as e:
            raise NoAnswer(f"{self._sent}: {e}") from e
        self._received += piece
        self._ended = not piece
        return not self._ended

    def _parse(self) -> Reply:
        head, _, body = self._received.partition(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 "):
            raise NoAnswer(f"{self._sent}: the server hung up without an answer")
        if b"transfer-encoding: chunked" in head.lower():
            body = _dechunked(body)
        status = int(head.split(b" ", 2)[1])
        if b"text/event-stream" not in head.lower():
            try:
                return Reply(status, json.loads(body) if body else None)
            except ValueError:
                raise NoAnswer(f"{self._sent}: {status}, cut off after {len(body)} bytes") from None
        lines = [line[5:].strip() for line in body.split(b"\n") if line.startswith(b"data:")]
        return Reply(status, None, [json.loads(line) for line in lines if line != b"[DONE]"])


def _dechunked(body: bytes) -> bytes:
    data = b""
    while body:
        size, _, rest = body.partition(b"\r\n")
        n = int(size or b"0", 16)
        data, body = data + rest[:n], rest[n + 2 :]
        if n == 0:
            break
    return data


class HttpServer:
    """llama-server as a profile starts it, and started again with other options; its files survive."""

    def __init__(self, files: DemoFiles, bin_dir: Path, directory: Path, profile: str, context: int) -> None:
        self.files, self.bin_dir, self.directory, self.profile, self.context = (
            *(files, bin_dir),
            *(directory, profile, context),
        )
        self.slot_dir, self._kept = directory / "slots", directory / "kept"
        self.slot_dir.mkdir(parents=True)
        self.server: Server | None = None

    def start(self, extra: list[str], *, again: bool = False) -> None:
        """A new process. With `again` the slot directory is as it was at the last start, for a history told anew."""
        self.stop()
        source, target = (self._kept, self.slot_dir) if again else (self.slot_dir, self._kept)
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)
        self.server = launch(self._plan(extra), directory=self.directory / "runs")
        self.server.wait_ready(stall_timeout=60)
        host, _, port = self.server.url.removeprefix("http://").partition(":")
        self._address = (host, int(port))

    def _plan(self, extra: list[str]) -> Any:
        plain = {"batched-unified": "batched", "stock-defaults": "batched"}.get(self.profile, self.profile)
        more = ["--kv-unified"] if self.profile == "batched-unified" else []
        plan = make_plan(
            self.files.model,
            bin_dir=self.bin_dir,
            sidecar=self.files.sidecar,
            profile=plain,
            ctx_size=self.context,
            port=0,
            slot_dir=self.slot_dir,
            extra=["--threads", "1", *more, *extra],
            environ={},
        )
        if self.profile != "stock-defaults":
            return plan
        # what llama-server does by itself: as many slots as it likes, one KV cache for all, idle ones cleared
        argv = [plan.argv[0], "--model", str(plan.model), "--rwkv-ms-sidecar", str(plan.sidecar)]
        argv += ["--rwkv-ms-mode", "batched", "--ctx-size", str(self.context), "--host", plan.host, "--port", "0"]
        argv += ["--slot-save-path", str(self.slot_dir), "--threads", "1", *extra]
        return replace(plan, argv=tuple(argv))

    def stop(self) -> None:
        if self.server is not None:
            self.server.stop()
            self.server = None

    def begin(self, method: str, path: str, body: Any = None) -> Pending:
        return Pending(self._address, method, path, body)

    def call(self, method: str, path: str, body: Any = None) -> Reply:
        return self.begin(method, path, body).result()

    def wait(self, seconds: float) -> None:
        time.sleep(seconds)

    def file(self, name: str) -> bytes:
        return (self.slot_dir / name).read_bytes()

    @property
    def log(self) -> str:
        return self.server.log_path.read_text(errors="replace") if self.server else ""
