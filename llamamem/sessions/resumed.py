"""What was resumed in which slot of which server: notes for the next process, in the user's state directory.

A note names the point that the next save of the slot must go on from, and the server holds the save against it: what
was in the slot before a restart, a sleep or a reset, or is another's by now, does not go on from there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import time
from pathlib import Path

import psutil
from pydantic import BaseModel, ValidationError

from llamamem.errors import LlamamemError
from llamamem.formats.private import replace_private
from llamamem.formats.run import state_dir
from llamamem.serving.client import Client
from llamamem.serving.runs import live_runs
from llamamem.serving.slots import slot_key
from llamamem.sessions.session import Session

NO_TEXT = hashlib.sha256(b"").hexdigest()

_LEFT = 60.0  # seconds, after which a file that lives for moments is one that a killed process left
# what this package, of this version or an older one, and the server write into a slot directory for moments
_OURS = re.compile(
    r"llamamem-[0-9a-f]{16}\.state|llamamem-health-[0-9a-f]{12}-.+|llamamem-(health-)?(?P<pid>\d+)-[0-9a-f]+[.-].+"
    r"|\.llamamem-.+-slot-\d+\.(json|lock)|\.?llamamem-[0-9a-f]+\.state\.part|.+\.(?P<server>\d+)\.part"
)


class Point(BaseModel):
    """A place in what a slot learnt: hash of the memory that its text began on (None: an empty one), tokens of the
    text since, and their hash."""

    origin: str | None
    n_text: int = 0
    text: str = NO_TEXT


class Resumed(BaseModel):
    server: str  # its URL
    run: str | None  # tells this run of it from another at the same address, where that is known
    slot: int
    store: str
    session: Session  # the version that a save replaces
    point: Point


def noted(server: str, slot: int) -> Resumed | None:
    return _read(_path(server, slot))


def note(resumed: Resumed) -> None:
    """The caller holds the slot."""
    replace_private(_path(resumed.server, resumed.slot), resumed.model_dump_json().encode())


def forget(server: str, slot: int) -> None:
    _path(server, slot).unlink(missing_ok=True)


def release(store: str, name: str, *, api_key: str | None = None, keep_slot: bool = False) -> list[str]:
    """Forgets the notes of a session that is no more, and empties the slots that still hold its memory.

    Returns what could not be emptied, a line each.
    """
    left = []
    for resumed in _all():
        if (resumed.store, resumed.session.name) != (store, name):
            continue
        if not keep_slot:
            try:
                _empty(resumed, api_key)
            except LlamamemError as e:
                left.append(f"slot {resumed.slot} of {resumed.server} may still hold the memory of {name!r}: {e}")
            # nor may what `llamamem health` laid aside of it, before it was killed, come back
            _path(resumed.server, resumed.slot).with_suffix(".health").unlink(missing_ok=True)
        forget(resumed.server, resumed.slot)
    return left


def sweep(slot_dir: Path | None = None) -> None:
    """Removes what killed processes left in the slot directories that are known, and notes of servers that are gone."""
    runs = live_runs(starting=True)
    ids = {run.run_id for run in runs}
    for resumed in _all():
        if resumed.run is not None and _RUN_ID.fullmatch(resumed.run) and resumed.run not in ids:
            forget(resumed.server, resumed.slot)
    aside = {_file_of(path) for path in _listed(state_dir() / "resumed") if path.suffix == ".health"}
    places = {Path(run.slot_dir) for run in runs if run.slot_dir} | ({slot_dir} if slot_dir else set())
    with contextlib.suppress(OSError):
        places |= {path for path in (state_dir() / "slots").iterdir() if path.is_dir()}
    for path in (path for place in places for path in _listed(place)):
        with contextlib.suppress(OSError):
            if _is_left(path) and path.name not in aside:
                path.unlink()


_RUN_ID = re.compile(r"\d{8}-\d{6}-[0-9a-f]{6}")


def _empty(resumed: Resumed, api_key: str | None) -> None:
    with Client(resumed.server, api_key=api_key, timeout=30) as client:
        for slot in client.slots():
            memory = slot.get("rwkv_ms") or {}
            holds = memory.get("given") and memory.get("origin") == resumed.point.origin
            if slot.get("id") == resumed.slot and holds:
                client.reset_memory(resumed.slot)


def _is_left(path: Path) -> bool:
    match = _OURS.fullmatch(path.name)
    if match is None or not path.is_file() or time.time() - path.lstat().st_mtime < _LEFT:
        return False
    pid = match["pid"] or match["server"]
    return pid is None or not psutil.pid_exists(int(pid))


def _file_of(note: Path) -> str | None:
    """What `llamamem health` laid aside of a slot, and its next run puts back."""
    try:
        file = json.loads(note.read_bytes())["file"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return file if isinstance(file, str) else None


def _listed(place: Path) -> list[Path]:
    try:
        return list(place.iterdir())
    except OSError:
        return []


def _all() -> list[Resumed]:
    found = (_read(path) for path in _listed(state_dir() / "resumed") if path.suffix == ".json")
    return [resumed for resumed in found if resumed is not None]


def _read(path: Path) -> Resumed | None:
    try:
        return Resumed.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def _path(server: str, slot: int) -> Path:
    return state_dir() / "resumed" / f"{slot_key(server, slot)}.json"
