"""Finds servers that run, by their records."""

from __future__ import annotations

import psutil

from llamamem.errors import LlamamemError
from llamamem.formats.run import RunRecord, read_run, runs_dir


def live_runs() -> list[RunRecord]:
    """The records of all servers that are ready now, the oldest first. A record that cannot be read is left out."""
    records = []
    for path in sorted(runs_dir().glob("*.json")):
        try:
            record = read_run(path)
        except LlamamemError:
            continue
        if record.state == "ready" and _alive(record):
            records.append(record)
    return records


def find_run(run: str | None = None) -> RunRecord:
    """The server of that run id (or the start of one); without one, the only server that runs."""
    live = live_runs()
    found = [record for record in live if run is None or record.run_id.startswith(run)]
    if len(found) == 1:
        return found[0]
    if found:
        ids = ", ".join(f"{record.run_id} at {record.url}" for record in found)
        raise LlamamemError(f"{len(found)} servers run: {ids}; choose one with --run")
    if run is None:
        raise LlamamemError("no server runs; start one with `llamamem serve`, or give --url and --slot-dir")
    ids = ", ".join(record.run_id for record in live) or "none"
    raise LlamamemError(f"--run {run}: no such server runs (running: {ids})")


def _alive(record: RunRecord) -> bool:
    """A pid alone may belong to another process by now."""
    try:
        return abs(psutil.Process(record.pid).create_time() - record.create_time) < 1.0
    except psutil.Error:
        return False
