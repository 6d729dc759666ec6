"""Which server is checked, and what is known of it without asking it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from llamamem.errors import LlamamemError
from llamamem.formats.run import RunRecord
from llamamem.serving.runs import find_run, live_runs


@dataclass(frozen=True)
class Target:
    """What is known of a server from elsewhere: its run record, or what the user gave. Paths are absolute."""

    url: str
    run_id: str | None = None
    profile: str | None = None
    parallel: int | None = None  # slots that it was started with
    build: str | None = None  # identity that its binary reported before it was started
    model: Path | None = None
    sidecar: Path | None = None
    log: Path | None = None
    slot_dir: Path | None = None
    trace: Path | None = None  # reference trace to compare


def find_target(run: str | None = None, url: str | None = None, **known: Path | None) -> Target:
    """The recorded run of that name, or the server at a URL, with a record or without.

    `known` are paths that replace those of the record: model, sidecar, log, slot_dir, trace. Raises LlamamemError when
    there is no such run.
    """
    if run is not None and url is not None:
        raise LlamamemError("--run and --url both name a server; give one of them")
    if url is None:
        target = target_of(find_run(run))
    else:
        url = url.rstrip("/")
        record = next((record for record in live_runs() if record.url == url), None)
        target = Target(url) if record is None else target_of(record)
    given: dict[str, Any] = {name: path.absolute() for name, path in known.items() if path is not None}
    return replace(target, **given)


def target_of(record: RunRecord) -> Target:
    parallel = next((value for arg, value in pairwise(record.argv) if arg == "--parallel"), None)
    return Target(
        url=record.url,
        run_id=record.run_id,
        profile=record.profile,
        parallel=int(parallel) if parallel else None,
        build=record.build,
        model=Path(record.model),
        sidecar=Path(record.sidecar) if record.sidecar else None,
        log=Path(record.log),
        slot_dir=Path(record.slot_dir) if record.slot_dir else None,
    )
