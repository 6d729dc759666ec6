"""Finds servers by their records, and stops one that another process started."""

from __future__ import annotations

import contextlib
import signal
import time
from pathlib import Path
from typing import Literal

import psutil

from llamamem.errors import LlamamemError
from llamamem.formats.run import RunRecord, read_run, runs_dir, write_run
from llamamem.serving.child import signal_group, terminate

Shown = Literal["starting", "ready", "stopped", "killed", "exited", "failed", "lost"]

_KEPT = 50  # records and logs of runs that are over
_LATE = 5.0  # seconds for a launcher that was asked twice, and for the kernel after SIGKILL


def all_runs(directory: Path | None = None) -> list[RunRecord]:
    """Every record, the oldest run first. One that cannot be read is left out."""
    records = []
    for path in (runs_dir() if directory is None else directory).glob("*.json"):
        with contextlib.suppress(LlamamemError):
            records.append(read_run(path))
    return sorted(records, key=lambda record: (record.started, record.run_id))


def live_runs(*, starting: bool = False, directory: Path | None = None) -> list[RunRecord]:
    """The records of all servers that are ready now (with `starting` also those that load), the oldest first."""
    states = ("starting", "ready") if starting else ("ready",)
    return [record for record in all_runs(directory) if record.state in states and is_alive(record)]


def find_run(run: str | None = None, *, starting: bool = False) -> RunRecord:
    """The server of that name, or of a run id that starts so; without one, the only server that runs."""
    live = live_runs(starting=starting)
    named = [record for record in live if record.name == run]
    found = named or [record for record in live if run is None or record.run_id.startswith(run)]
    if len(found) == 1:
        return found[0]
    if found:
        ids = ", ".join(f"{record.name} at {record.gateway or record.url}" for record in found)
        raise LlamamemError(f"{len(found)} servers run: {ids}; choose one with --run")
    if run is None:
        raise LlamamemError("no server runs; start one with `llamamem serve`, or give --url")
    names = ", ".join(record.name for record in live) or "none"
    raise LlamamemError(f"--run {run}: no such server runs (running: {names})")


def last_run(run: str | None = None) -> RunRecord:
    """Of that name or start of a run id, or of all: the one that lives, else the one that was started last."""
    found = [record for record in all_runs() if run in (None, record.name) or record.run_id.startswith(str(run))]
    if not found:
        what = "no server was started yet" if run is None else f"--run {run}: no such run is recorded"
        raise LlamamemError(f"{what}; `llamamem ps --all` lists those that are")
    live = [record for record in found if is_alive(record)]
    if run is None and len(live) > 1:
        raise LlamamemError(f"{len(live)} servers run: {', '.join(r.name for r in live)}; choose one with --run")
    return (live or found)[-1]


def is_alive(record: RunRecord) -> bool:
    """That the recorded server still runs; a pid alone may belong to another process by now."""
    return record.ended is None and _process(record.pid, record.create_time) is not None


def shown_state(record: RunRecord) -> Shown:
    """The recorded state; `lost` when the launcher was killed before it could record an end."""
    return record.state if record.ended is not None or is_alive(record) else "lost"


def stop_run(record: RunRecord, grace: float = 15.0) -> Literal["stopped", "killed", "gone"]:
    """Stops a server, `gone` when it does not run any more. After `grace` seconds without an end it is killed.

    `llamamem serve` is asked, if it still is the process that was recorded, and stops its server in order; without it
    the server's own process group is signalled, if its leader still is the process that was recorded.
    """
    server = _process(record.pid, record.create_time)
    launcher = _process(record.launcher_pid, record.launcher_create_time)
    if server is None or record.ended is not None:
        return "gone"
    asked = launcher if record.launcher_stops else None
    ending: Literal["stopped", "killed"] = "stopped"
    _signal(record, asked, server, signal.SIGTERM)
    if not _ended(server, grace):
        ending = "killed"
        if asked is not None:  # the second signal ends its own grace time
            _signal(record, asked, server, signal.SIGTERM)
        if asked is None or not _ended(server, _LATE):
            _signal(record, None, server, signal.SIGKILL)
        if not _ended(server, _LATE):
            raise LlamamemError(f"{record.name}: pid {record.pid} does not end on SIGKILL; look at `ps {record.pid}`")
    if asked is not None:
        _ended(asked, _LATE)
    path = runs_dir() / f"{record.run_id}.json"
    with contextlib.suppress(LlamamemError, OSError):
        now = read_run(path)
        if now.ended is None and asked is None:
            write_run(now.model_copy(update={"state": ending, "ended": time.time()}), path)
        elif now.state == "killed":
            ending = "killed"
    return ending


def prune_runs(directory: Path, keep: int = _KEPT) -> None:
    """Removes records and logs of runs that are over, but for the last `keep`, and what a killed writer left behind."""
    over = [record for record in all_runs(directory) if not is_alive(record)]
    for record in over[: max(0, len(over) - keep)]:
        for path in (directory / f"{record.run_id}.json", directory / f"{record.run_id}.log"):
            path.unlink(missing_ok=True)
    for path in directory.glob(".*.json.*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > 60:
                path.unlink()


def _process(pid: int, create_time: float) -> psutil.Process | None:
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        if abs(process.create_time() - create_time) < 1.0 and process.status() != psutil.STATUS_ZOMBIE:
            return process
    return None


def _signal(record: RunRecord, launcher: psutil.Process | None, server: psutil.Process, number: int) -> None:
    """psutil compares creation times once more before it signals."""
    with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
        try:
            if launcher is not None:
                launcher.send_signal(number)
            elif server.is_running() and number == signal.SIGTERM:
                terminate(record.pid)
            elif server.is_running():
                signal_group(record.pid, number)
        except (psutil.AccessDenied, PermissionError) as e:
            raise LlamamemError(f"{record.name}: pid {record.pid} belongs to another user; stop it as that user") from e


def _ended(process: psutil.Process, timeout: float) -> bool:
    deadline = time.monotonic() + timeout
    while process.is_running() and _process(process.pid, process.create_time()) is not None:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
