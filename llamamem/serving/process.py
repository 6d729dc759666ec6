"""One llama-server process, from its first line of log to its end.

The child writes straight into its log file, so that its output outlives the launcher; whoever wants to see it follows
the file. It leads a process group of its own (Ctrl-C in the terminal reaches the launcher alone, which then stops the
child in order), and the kernel kills it when the launcher dies without having stopped it.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import filelock
import httpx
import psutil

from llamamem.errors import LlamamemError
from llamamem.formats.private import private_directory
from llamamem.formats.run import RunRecord, redacted, runs_dir, write_run
from llamamem.serving.child import die_with, signal_group, terminate
from llamamem.serving.preflight import Checked, check_port
from llamamem.serving.profiles import Plan
from llamamem.serving.runs import live_runs, prune_runs

Ending = Literal["stopped", "killed", "exited"]

_POLL = 0.05  # seconds
_LOOKS_LIKE_ERROR = re.compile(r"\berror\b|\bfailed\b|refus|couldn't|unable|^E \w+", re.IGNORECASE)
_STAMP = re.compile(r"^[\d.]+ (?=[A-Z] )")  # of llama-server's log, before the level
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_CLOSING = b"cleaning up before exit"  # llama-server's line after its last task: no file is written any more
_LINGER = 1.0  # seconds from there, for the memory to be freed and the last answers to leave


class Server:
    """A started llama-server; `launch` makes it. As a context manager it is stopped on the way out.

    `unrecorded` is what kept the last change from being written to the run record, a full disk for one.
    """

    def __init__(self, process: subprocess.Popen[bytes], record: RunRecord, record_path: Path) -> None:
        self.process = process
        self.record = record
        self.record_path = record_path
        self.log_path = Path(record.log)
        self.unrecorded: OSError | None = None

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
        """Returns when /health is 200 and the model is listed, by this process and nobody else on its port.

        Raises LlamamemError when the process exits first (with the last error lines of its log), or when nothing was
        logged for `stall_timeout` seconds. `on_wait` is called between polls; what it raises ends the wait.
        """
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        size, progress_at = -1, time.monotonic()
        with httpx.Client(timeout=5.0, trust_env=False, headers=headers) as http:
            while True:
                if self._has_ended():
                    self._update(state="failed", ended=time.time(), exit_code=self.process.returncode)
                    raise LlamamemError(
                        f"llama-server {self.how_it_ended} before it was ready: {_errors(self.log_path)}"
                        f" (log: {self.log_path}){self._stolen_port()}"
                    )
                if self._listens() and _answers(http, self.url):
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
        while not self._has_ended():
            if on_wait is not None:
                on_wait()
            time.sleep(_POLL)
        if self.record.ended is None:
            self._update(state="exited", ended=time.time(), exit_code=self.process.returncode)
        return self.process.returncode

    def stop(
        self,
        grace: float = 10.0,
        *,
        hurry: Callable[[], bool] = lambda: False,
        state: Literal["failed"] | None = None,
    ) -> Ending:
        """SIGTERM, and SIGKILL to the process group after `grace` seconds, or as soon as `hurry` says so.

        Says how it ended; calling it again is harmless. A server that has stopped working and only waits for clients
        to hang up, as llama-server does with open streams, is not waited for; that is a stop in order all the same.
        The pid cannot have been taken over by another process: it is our own child and is not reaped before this.
        """
        ending: Ending = "exited"
        if not self._has_ended():
            ending = "stopped"
            deadline, closing, logged = time.monotonic() + grace, None, _size(self.log_path)
            terminate(self.process.pid)
            while not self._has_ended():
                now = time.monotonic()
                if closing is None and _CLOSING in _tail(self.log_path, logged):
                    closing = now
                lingers = closing is not None and now > closing + _LINGER
                if lingers or now > deadline or hurry():
                    ending = "stopped" if lingers else "killed"
                    signal_group(self.process.pid, signal.SIGKILL)
                    self.process.wait()
                time.sleep(_POLL)
        if self.record.ended is None:
            self._update(state=state or ending, ended=time.time(), exit_code=self.process.returncode)
        return ending

    @property
    def how_it_ended(self) -> str:
        """`exited with status 1`, `was ended by SIGKILL`."""
        code = self.process.returncode
        if code >= 0:
            return f"exited with status {code}"
        with contextlib.suppress(ValueError):
            return f"was ended by {signal.Signals(-code).name}"
        return f"was ended by signal {-code}"

    def _has_ended(self) -> bool:
        """Before the process is reaped, and its pid with it, the rest of its group is killed: nothing outlives it."""
        if self.process.returncode is None and hasattr(os, "waitid"):  # macOS: from Python 3.13
            with contextlib.suppress(ChildProcessError):
                flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
                if os.waitid(os.P_PID, self.process.pid, flags) is None:
                    return False
                signal_group(self.process.pid, signal.SIGKILL)
        return self.process.poll() is not None

    def _update(self, **fields: Any) -> None:
        self.record = self.record.model_copy(update=fields)
        try:
            write_run(self.record, self.record_path)
            self.unrecorded = None
        except OSError as e:  # a full disk must not keep us from stopping the child
            self.unrecorded = e

    def _listens(self) -> bool:
        """That this process has the port open: another one that took it first may answer as a server would.

        With --port 0 the server takes a free port itself; asking the kernel which leaves no gap for another.
        """
        try:
            child = psutil.Process(self.process.pid)
            listed = getattr(child, "net_connections", None) or child.connections
            ports = [c.laddr.port for c in listed(kind="tcp") if c.status == psutil.CONN_LISTEN]
        except psutil.NoSuchProcess:
            return False
        except psutil.Error:  # a system that does not tell
            return self.record.port != 0
        if self.record.port == 0 and ports:
            self._update(port=ports[0], url=url_of(self.record.host, ports[0]))
        return self.record.port in ports

    def _stolen_port(self) -> str:
        try:
            check_port(self.record.host, self.record.port)
        except LlamamemError as e:
            return f"; {e}"
        return ""


def launch(
    plan: Plan,
    checked: Checked | None = None,
    *,
    build: str | None = None,
    name: str | None = None,
    directory: Path | None = None,
    stops_on_signal: bool = False,
    gateway: str | None = None,
    hidden: Mapping[str, str] | None = None,
) -> Server:
    """Starts the planned server; returns at once, `wait_ready` waits. The record and log go to `directory`.

    Call it from a thread that lives as long as the server: the kernel ties the child to the thread that made it.
    `stops_on_signal` promises that this program stops the server when it gets SIGTERM; `hidden` is added to its
    environment, and recorded nowhere; `gateway` is the URL that clients are to ask instead. Raises LlamamemError when
    the binary does not run, when a live run has the name, and when there is no room for log and record.
    """
    directory = runs_dir() if directory is None else directory
    run_id = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    name = run_id if name is None else name
    if not _NAME.fullmatch(name):
        raise LlamamemError(f"--name {name}: give up to 64 letters, digits, dots, dashes and underscores")
    log_path, record_path = directory / f"{run_id}.log", directory / f"{run_id}.json"
    started = time.time()
    process = None
    try:
        private_directory(directory)
        with filelock.FileLock(directory / ".lock", timeout=30):  # of two with one name, one is told
            prune_runs(directory)
            if other := [run for run in live_runs(starting=True, directory=directory) if run.name == name]:
                raise LlamamemError(
                    f"--name {name}: a server of that name runs at {other[0].url}; `llamamem stop {name}`, or give"
                    " another name"
                )
            process = _start(plan, run_id, log_path, hidden)
            record = RunRecord(
                run_id=run_id,
                name=name,
                state="starting",
                pid=process.pid,
                create_time=_create_time(process.pid, started),
                launcher_pid=os.getpid(),
                launcher_create_time=_create_time(os.getpid(), started),
                launcher_stops=stops_on_signal,
                host=plan.host,
                port=plan.port,
                url=url_of(plan.host, plan.port),
                gateway=gateway,
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
            write_run(record, record_path)
    except (OSError, filelock.Timeout) as e:
        if process is not None:
            signal_group(process.pid, signal.SIGKILL)
            process.wait()
        with contextlib.suppress(OSError):
            log_path.unlink(missing_ok=True)
        if isinstance(e, OSError) and e.filename == plan.argv[0]:
            raise LlamamemError(f"{plan.argv[0]}: cannot start the server ({e.strerror}); run `llamamem build`") from e
        why = e.strerror if isinstance(e, OSError) and e.strerror else "another launcher holds its lock"
        raise LlamamemError(
            f"{directory}: cannot hold the log and record of a run ({why}); make room, or set XDG_STATE_HOME"
        ) from e
    return Server(process, record, record_path)


def _start(plan: Plan, run_id: str, log_path: Path, hidden: Mapping[str, str] | None) -> subprocess.Popen[bytes]:
    with os.fdopen(os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as log:
        # also the proof, before anything starts, that the log can be written
        log.write(f"llamamem: run {run_id}\n".encode())
        log.flush()
        return subprocess.Popen(
            plan.argv,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with(os.getpid()),
            env={**os.environ, **(hidden or {})},
        )


def _create_time(pid: int, otherwise: float) -> float:
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).create_time()
    return otherwise


def url_of(host: str, port: int) -> str:
    """Where this machine reaches what listens there."""
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


def _tail(path: Path, start: int) -> bytes:
    """What was written since the file had `start` bytes."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        file.seek(start)
        return file.read()
    return b""


def _errors(log: Path, n: int = 4) -> str:
    """The first of them, which say why, and the last, which say what came of it."""
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "its log cannot be read"
    lines = [_STAMP.sub("", line.strip()) for line in text.splitlines() if line.strip()]
    errors = list(dict.fromkeys(line for line in lines if _LOOKS_LIKE_ERROR.search(line)))
    chosen = errors if len(errors) <= n else errors[: n // 2] + errors[-(n // 2) :]
    return " | ".join(chosen or lines[-n:]) or "it logged nothing"
