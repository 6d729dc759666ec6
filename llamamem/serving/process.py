"""One llama-server process, from its first line of log to its end.

The child writes straight into its log file, so that its output outlives the launcher; whoever wants to see it follows
the file. It leads a process group of its own (Ctrl-C in the terminal reaches the launcher alone, which then stops the
child in order), and the kernel kills it when the launcher dies without having stopped it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Literal, TextIO

import httpx
import psutil

from llamamem.errors import LlamamemError
from llamamem.formats.run import RunRecord, redacted, runs_dir, write_run
from llamamem.serving.preflight import Checked
from llamamem.serving.profiles import Plan

Ending = Literal["stopped", "killed", "exited"]

_POLL = 0.05  # seconds
_LOOKS_LIKE_ERROR = re.compile(r"\berror\b|\bfailed\b|refus|couldn't|unable|\bE \w+ ", re.IGNORECASE)
_PR_SET_PDEATHSIG = 1


class StopRequested(Exception):
    """A signal asked for the end while something was being waited for."""


class Server:
    """A started llama-server; `launch` makes it. As a context manager it is stopped on the way out."""

    def __init__(self, process: subprocess.Popen[bytes], record: RunRecord, record_path: Path) -> None:
        self.process = process
        self.record = record
        self.record_path = record_path
        self.log_path = Path(record.log)

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return self.record.url

    def wait_ready(
        self,
        *,
        stall_timeout: float = 300.0,
        api_key: str | None = None,
        on_wait: Callable[[], None] | None = None,
    ) -> None:
        """Returns when /health is 200 and the model is listed.

        Raises LlamamemError when the process exits first (with the last error lines of its log), or when nothing was
        logged for `stall_timeout` seconds. `on_wait` is called between polls; what it raises ends the wait.
        """
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        size, progress_at = -1, time.monotonic()
        with httpx.Client(timeout=5.0, trust_env=False, headers=headers) as http:
            while True:
                if self.process.poll() is not None:
                    code = self.process.returncode
                    self._update(state="failed", ended=time.time(), exit_code=code)
                    raise LlamamemError(
                        f"llama-server {_how(code)} before it was ready: {_last_errors(self.log_path)}"
                        f" (log: {self.log_path})"
                    )
                if self.record.port == 0:
                    self._find_port()
                if self.record.port != 0 and _answers(http, self.url):
                    self._update(state="ready")
                    return
                if (now_size := _size(self.log_path)) != size:
                    size, progress_at = now_size, time.monotonic()
                elif time.monotonic() - progress_at > stall_timeout:
                    self.stop(state="failed")
                    raise LlamamemError(
                        f"llama-server logged nothing for {stall_timeout:g} s and is not ready; it was stopped;"
                        f" see {self.log_path}, or give a longer --stall-timeout"
                    )
                if on_wait is not None:
                    on_wait()
                time.sleep(_POLL)

    def wait(self, on_wait: Callable[[], None] | None = None) -> int:
        """Waits until the process ends by itself; its exit code (negative: a signal)."""
        while self.process.poll() is None:
            if on_wait is not None:
                on_wait()
            time.sleep(_POLL)
        if self.record.ended is None:
            self._update(state="exited", ended=time.time(), exit_code=self.process.returncode)
        return self.process.returncode

    def stop(self, grace: float = 10.0, *, state: Literal["failed"] | None = None) -> Ending:
        """SIGTERM to the process group, SIGKILL after `grace` seconds. Says how it ended; calling it again is harmless.

        The pid cannot have been taken over by another process: it is our own child and is not reaped before this.
        """
        if self.process.poll() is not None:
            ending: Ending = "exited"
        else:
            ending = "stopped"
            try:
                _signal_group(self.process, signal.SIGTERM)
                self.process.wait(grace)
            except (subprocess.TimeoutExpired, StopRequested):  # whoever asks twice does not want to wait
                ending = "killed"
                _signal_group(self.process, signal.SIGKILL)
                self.process.wait()
        if self.record.ended is None:
            self._update(state=state or ending, ended=time.time(), exit_code=self.process.returncode)
        return ending

    def _update(self, **fields: Any) -> None:
        self.record = self.record.model_copy(update=fields)
        with contextlib.suppress(OSError):  # a full disk must not keep us from stopping the child
            write_run(self.record, self.record_path)

    def _find_port(self) -> None:
        """With --port 0 the server takes a free port itself; asking the kernel which leaves no gap for another."""
        with contextlib.suppress(psutil.Error):
            child = psutil.Process(self.process.pid)
            listed = getattr(child, "net_connections", None) or child.connections
            ports = [c.laddr.port for c in listed(kind="tcp") if c.status == psutil.CONN_LISTEN]
            if ports:
                self._update(port=ports[0], url=_url(self.record.host, ports[0]))


def launch(
    plan: Plan, checked: Checked | None = None, *, build: str | None = None, directory: Path | None = None
) -> Server:
    """Starts the planned server; returns at once, `wait_ready` waits. The record and log go to `directory`.

    Call it from a thread that lives as long as the server: the kernel ties the child to the thread that made it.
    Raises LlamamemError when the binary does not run.
    """
    directory = runs_dir() if directory is None else directory
    run_id = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    log_path = directory / f"{run_id}.log"
    started = time.time()
    launcher = os.getpid()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with open(log_path, "xb") as log:
            process = subprocess.Popen(
                plan.argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with(launcher),
            )
    except OSError as e:
        raise LlamamemError(f"{e.filename or plan.argv[0]}: cannot start the server ({e.strerror})") from e
    try:
        create_time = psutil.Process(process.pid).create_time()
    except psutil.Error:
        create_time = started
    record = RunRecord(
        run_id=run_id,
        state="starting",
        pid=process.pid,
        create_time=create_time,
        launcher_pid=launcher,
        host=plan.host,
        port=plan.port,
        url=_url(plan.host, plan.port),
        profile=plan.profile,
        model=str(plan.model),
        base_sha256=checked.base_sha256 if checked else None,
        sidecar=str(plan.sidecar) if plan.sidecar else None,
        sidecar_sha256=checked.sidecar_sha256 if checked else None,
        slot_dir=str(plan.slot_dir) if plan.slot_dir else None,
        log=str(log_path),
        argv=redacted(plan.argv),
        build=build,
        started=started,
    )
    server = Server(process, record, directory / f"{run_id}.json")
    server._update()
    return server


class Signals:
    """While it is entered, SIGINT, SIGTERM and SIGHUP are noted instead of obeyed; `check` raises StopRequested.

    The second one raises at once, wherever the program is: it ends the grace time of a stop.
    """

    _NUMBERS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))

    def __init__(self) -> None:
        self.received: list[int] = []
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        for number in self._NUMBERS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)
        if len(self.received) == 2:
            raise StopRequested

    def check(self) -> None:
        if self.received:
            raise StopRequested


class Follower:
    """Copies what is new in a log file to a stream each time it is called."""

    def __init__(self, path: Path, out: TextIO = sys.stderr) -> None:
        self._file = path.open("r", encoding="utf-8", errors="replace")
        self._out = out

    def __call__(self) -> None:
        if text := self._file.read():
            self._out.write(text)
            self._out.flush()

    def close(self) -> None:
        self()
        self._file.close()


def _die_with(launcher: int) -> Callable[[], None] | None:
    """For the child between fork and exec: SIGKILL me when my parent dies. Linux only: no such call elsewhere."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)  # looked up before the fork: nothing may be loaded after it

    def apply() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != launcher:  # it died in between
            os._exit(127)

    return apply


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _url(host: str, port: int) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _answers(http: httpx.Client, url: str) -> bool:
    try:
        if http.get(f"{url}/health").status_code != 200:
            return False
        models = http.get(f"{url}/v1/models")
        # 401: the list is behind an API key that we were not given; the server does answer
        return models.status_code == 401 or (models.status_code == 200 and bool(models.json().get("data")))
    except (httpx.TransportError, ValueError):
        return False


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _last_errors(log: Path, n: int = 4) -> str:
    try:
        lines = [
            line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()
        ]
    except OSError:
        return "its log cannot be read"
    chosen = [line for line in lines if _LOOKS_LIKE_ERROR.search(line)] or lines
    return " | ".join(chosen[-n:]) or "it logged nothing"


def _how(code: int) -> str:
    if code >= 0:
        return f"exited with status {code}"
    with contextlib.suppress(ValueError):
        return f"was ended by {signal.Signals(-code).name}"
    return f"was ended by signal {-code}"
