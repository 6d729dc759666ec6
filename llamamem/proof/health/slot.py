"""Slot 0 of a server while it is tested: texts, answers, saved states."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock

from llamamem.errors import LlamamemError
from llamamem.serving.client import Client

SLOT = 0

# English that any tokenizer makes some dozens of tokens of
FIRST = (
    "The lighthouse keeper wrote the weather down each evening: wind from the west, a falling glass, two ships passed."
)
OTHER = (
    "Recipe: soak the chickpeas overnight, drain them well, then simmer for an hour with cumin, onion and a bay leaf."
)
NEXT = " In the morning the keeper"

_MOST = 64  # tokens of a text


Choices = tuple[tuple[int, float], ...]  # the likeliest tokens: id, log-probability


@dataclass(frozen=True)
class Answer:
    """Greedy tokens, what else was likely for each, and how many prompt tokens were processed and reused."""

    tokens: tuple[int, ...]
    choices: tuple[Choices, ...]
    processed: int
    reused: int


class SlotProbe:
    """What the checks do with slot 0. Files in the slot directory have names of our own, and all are removed."""

    def __init__(self, client: Client, slot_dir: Path) -> None:
        self.client = client
        self.slot_dir = slot_dir
        self._prefix = f"llamamem-health-{secrets.token_hex(6)}"
        self._files: list[Path] = []
        self._ids: dict[str, list[int]] = {}

    def ids(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a text, at most 64."""
        if text not in self._ids:
            self._ids[text] = self.client.tokenize(text, add_special=special)[:_MOST]
        return self._ids[text]

    def generate(self, prompt: list[int], n: int, **options: Any) -> Answer:
        """Exactly n greedy tokens; an option that is None is left to the server.

        A setting of the memory that somebody left on the slot stays in force.
        """
        request = {"n_probs": 20, "cache_prompt": True, "ignore_eos": True, "return_tokens": True, **options}
        request = {name: value for name, value in request.items() if value is not None}
        found = self.client.completion(prompt, n_predict=n, id_slot=SLOT, **request)
        choices = tuple(
            tuple((int(top["id"]), float(top["logprob"])) for top in entry["top_logprobs"])
            for entry in found["completion_probabilities"]
        )
        timings = found["timings"]
        answer = Answer(tuple(found["tokens"]), choices, int(timings["prompt_n"]), int(timings.get("cache_n", 0)))
        if len(answer.tokens) != n:
            raise LlamamemError(f"{n} tokens were asked for, {len(answer.tokens)} came")
        return answer

    def memory(self) -> dict[str, Any]:
        """The slot's `rwkv_ms` object of /slots."""
        found = next(slot for slot in self.client.slots() if slot["id"] == SLOT)
        memory: dict[str, Any] = found["rwkv_ms"]
        return memory

    def others(self) -> list[tuple[int, bool, int | None]]:
        """The other slots: id, whether it works now, its last task."""
        slots = self.client.slots()
        return [(slot["id"], slot["is_processing"], slot.get("id_task")) for slot in slots if slot["id"] != SLOT]

    def erase(self) -> None:
        self.client.erase_slot(SLOT)

    def file(self, name: str) -> Path:
        """A file in the slot directory whose name nobody else has."""
        path = self.slot_dir / f"{self._prefix}-{name}"
        if path not in self._files:
            self._files.append(path)
        return path

    def save(self, name: str, *, memory_only: bool = False) -> Path:
        path = self.file(name)
        (self.client.save_memory if memory_only else self.client.save_slot)(SLOT, path.name)
        if not path.is_file():
            raise LlamamemError(
                f"{path}: the server did not write it there; give its own --slot-save-path as --slot-dir"
            )
        return path

    def restore(self, path: Path) -> None:
        self.client.restore_slot(SLOT, path.name)

    def restore_memory(self, path: Path) -> None:
        self.client.restore_memory(SLOT, path.name)

    def try_restore(self, path: Path, *, memory_only: bool = False) -> tuple[int, str]:
        """HTTP status and message of a restore that should be refused."""
        action = "memory-restore" if memory_only else "restore"
        response = self.client.request(
            "POST", f"/slots/{SLOT}", params={"action": action}, json={"filename": path.name}
        )
        try:
            return response.status_code, str(response.json()["error"]["message"])
        except (ValueError, KeyError, TypeError):
            return response.status_code, response.text[:200]

    def own_setting(self) -> None:
        """Back from the setting of the last request to the slot's own: a change of scale would drop the next text."""
        self.client.request("POST", f"/slots/{SLOT}", params={"action": "memory-set"}, json={})

    def remove_files(self) -> None:
        for path in self._files:
            with suppress(OSError):
                path.unlink(missing_ok=True)


@contextmanager
def held(slot_dir: Path, port: int | str | None, wait: float) -> Iterator[None]:
    """Keeps `llamamem session` off slot 0, if it ever was at this server. Raises LlamamemError when it is at work."""
    # [TAG_SLOT_LOCK] the name that llamamem/sessions/client.py gives it
    path = slot_dir / f".llamamem-{port}-slot-{SLOT}.lock"
    if not path.exists():
        yield
        return
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=wait)
    except filelock.Timeout:
        raise LlamamemError(f"slot {SLOT} is held by `llamamem session`; try again later") from None
    try:
        yield
    finally:
        lock.release()
