"""Which slot is tested, and how what it held comes back, however the tests end."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
from pydantic import BaseModel, ValidationError

from llamamem.errors import LlamamemError
from llamamem.formats.private import replace_private
from llamamem.formats.run import state_dir
from llamamem.proof.health.evidence import Evidence, Fails, is_timeout
from llamamem.proof.health.slot import SlotProbe
from llamamem.serving.client import Client
from llamamem.serving.slots import held, slot_key

_WAIT = 30.0  # seconds, for a session that is at work in the slot
_DEFAULT = (False, 1.0)  # frozen, scale


class Kept(BaseModel):
    """What lies aside of a slot. After a kill the next run on the same run of the server puts it back."""

    pid: int
    run: str
    server: str
    slot: int
    file: str
    frozen: bool
    scale: float


@contextmanager
def slot_kept(e: Evidence) -> Iterator[list[str]]:
    """A slot to test, which is afterwards as it was, or the list that this gives says why not.

    One that holds nothing is taken if there is one: then nothing of anybody's is moved. `e.unkept` says why none is.
    """
    lost: list[str] = []
    with ExitStack() as stack:
        try:
            probe, memory = _choose(e, stack)
            kept = _keep(e, stack, probe, memory) if _is_used(memory) else None
        except Fails as fault:
            e.unkept = fault
        except (LlamamemError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            e.hung = "the save of the slot" if is_timeout(error) else None
            hint = "give the right --slot-dir"
            e.unkept = Fails(f"the slot cannot be saved, so nothing is tried in it: {error}", hint)
        else:
            e.kept = probe
            stack.callback(_put_back, e, probe, kept, memory, lost)
        yield lost


def put_back_after_a_kill(e: Evidence) -> None:
    """What an earlier run of these checks, which was killed, had laid aside on this run of the server."""
    for path in _notes():
        try:
            kept = Kept.model_validate_json(path.read_bytes())
        except (OSError, ValidationError):
            path.unlink(missing_ok=True)
            continue
        if kept.server != e.target.url or psutil.pid_exists(kept.pid):
            continue
        if kept.run == _run(e) and e.target.slot_dir is not None:
            file = e.target.slot_dir / kept.file
            now = next((slot.get("rwkv_ms") for slot in e.slots if slot.get("id") == kept.slot), None) or {}
            if file.exists() and not now.get("given"):  # or somebody gave it another memory since
                _restore(e.client, kept.slot, kept.file, (kept.frozen, kept.scale))
            file.unlink(missing_ok=True)
        path.unlink(missing_ok=True)


def _choose(e: Evidence, stack: ExitStack) -> tuple[SlotProbe, dict[str, Any]]:
    def rank(slot: dict[str, Any]) -> tuple[bool, bool, int]:
        return bool(slot.get("is_processing")), _is_used(slot.get("rwkv_ms") or {}), -int(slot["id"])

    slot = min((slot for slot in e.slots if slot.get("rwkv_ms")), key=rank, default=None)
    if slot is None:
        raise Fails("no slot has a memory")
    number = int(slot["id"])
    stack.enter_context(held(e.target.url, number, _WAIT))
    probe = SlotProbe(e.client, number, e.target.slot_dir)
    stack.callback(probe.remove_files)
    return probe, slot["rwkv_ms"]


def _is_used(memory: dict[str, Any]) -> bool:
    """Something would be lost with it: a memory, a text, a setting."""
    return bool(memory.get("given") or memory.get("n_text") or memory.get("tokens_written")) or (
        _setting(memory) != _DEFAULT
    )


def _setting(memory: dict[str, Any]) -> tuple[bool, float]:
    return bool(memory.get("frozen")), float(memory.get("scale", 1.0))


def _keep(e: Evidence, stack: ExitStack, probe: SlotProbe, memory: dict[str, Any]) -> Path:
    file = probe.save("kept.state")
    if (run := _run(e)) is not None:
        frozen, scale = _setting(memory)
        kept = Kept(
            pid=os.getpid(),
            run=run,
            server=e.target.url,
            slot=probe.id,
            file=file.name,
            frozen=frozen,
            scale=scale,
        )
        note = state_dir() / "resumed" / f"{slot_key(e.target.url, probe.id)}.health"
        replace_private(note, kept.model_dump_json().encode())
        stack.callback(note.unlink, missing_ok=True)
    return file


def _put_back(e: Evidence, probe: SlotProbe, kept: Path | None, memory: dict[str, Any], lost: list[str]) -> None:
    if e.hung is not None:
        lost.append(f"slot {probe.id} was not put back: the server does not answer")
        return
    try:
        if kept is None:
            probe.erase()
        else:
            _restore(e.client, probe.id, kept.name, _setting(memory))
    except (LlamamemError, ValueError) as error:
        lost.append(f"slot {probe.id} was not put back: {error}")


def _restore(client: Client, slot: int, file: str, setting: tuple[bool, float]) -> None:
    client.erase_slot(slot)
    client.restore_slot(slot, file)
    if setting != _DEFAULT:
        client.set_memory(slot, frozen=setting[0], scale=setting[1])


def _run(e: Evidence) -> str | None:
    """What tells this run of the server from a later one at its address."""
    return str(e.memory["run"]) if "run" in e.memory else e.target.run_id


def _notes() -> list[Path]:
    with contextlib.suppress(OSError):
        return sorted((state_dir() / "resumed").glob("*.health"))
    return []
