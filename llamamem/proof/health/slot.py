"""A slot of a server while it is tested: texts, answers, saved states."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamamem.errors import LlamamemError
from llamamem.serving.client import Client, encoded_memory

# English that any tokenizer makes some dozens of tokens of
FIRST = (
    "The lighthouse keeper wrote the weather down each evening: wind from the west, a falling glass, two ships passed."
)
OTHER = (
    "Recipe: soak the chickpeas overnight, drain them well, then simmer for an hour with cumin, onion and a bay leaf."
)
NEXT = " In the morning the keeper"
PLAIN_TEXT = "root ::= [ -~]*"  # GBNF: printable ASCII

_MOST = 64  # tokens of a text


Choices = tuple[tuple[int, float], ...]  # the likeliest tokens: id, log-probability


@dataclass(frozen=True)
class Answer:
    """Greedy tokens, what else was likely for each, and how many prompt tokens were processed and reused."""

    tokens: tuple[int, ...]
    choices: tuple[Choices, ...]
    processed: int
    reused: int


class Unknown(LlamamemError):
    """Files cannot be exchanged with the server."""


class SlotProbe:
    """What the checks do with a slot. Files in the slot directory have names of our own, and all are removed."""

    def __init__(self, client: Client, slot: int, slot_dir: Path | None) -> None:
        self.client = client
        self.id = slot
        self.slot_dir = slot_dir
        self._prefix = f"llamamem-health-{os.getpid()}-{secrets.token_hex(6)}"
        self._files: list[Path] = []
        self._ids: dict[str, list[int]] = {}

    def ids(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a text, at most 64."""
        if text not in self._ids:
            self._ids[text] = self.client.tokenize(text, add_special=special)[:_MOST]
        return self._ids[text]

    def generate(self, prompt: list[int], n: int, **options: Any) -> Answer:
        """Exactly n greedy tokens of plain text; an option that is None is left to the server.

        A base that was never taught anything says bytes, and the server has no probabilities of parts of characters.
        """
        fixed = {"n_probs": 20, "cache_prompt": True, "ignore_eos": True, "return_tokens": True, "grammar": PLAIN_TEXT}
        request = {**fixed, **options}
        request = {name: value for name, value in request.items() if value is not None}
        found = self.client.completion(prompt, n_predict=n, id_slot=self.id, **request)
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
        """What /slots says of the slot's memory and its setting; not of its text."""
        found = next(slot for slot in self.client.slots() if slot["id"] == self.id)
        return {name: value for name, value in found["rwkv_ms"].items() if name not in ("n_text", "text")}

    def others(self) -> list[tuple[int, bool, int | None]]:
        """The other slots: id, whether it works now, its last task."""
        slots = self.client.slots()
        return [(slot["id"], slot["is_processing"], slot.get("id_task")) for slot in slots if slot["id"] != self.id]

    def erase(self) -> None:
        """Text, memory and setting are gone."""
        self.client.erase_slot(self.id)

    def take(self) -> bytes:
        """The memory alone, as the bytes of its file."""
        return self.client.take_memory(self.id)[0]

    def file(self, name: str) -> Path:
        """A file in the slot directory whose name nobody else has."""
        if self.slot_dir is None:
            raise Unknown("the slot directory is not known, so no state is saved or restored; give --slot-dir")
        path = self.slot_dir / f"{self._prefix}-{name}"
        if path not in self._files:
            self._files.append(path)
        return path

    def save(self, name: str) -> Path:
        path = self.file(name)
        self.client.save_slot(self.id, path.name)
        if not path.is_file():
            raise LlamamemError(
                f"{path}: the server did not write it there; give its own --slot-save-path as --slot-dir"
            )
        return path

    def restore(self, path: Path) -> None:
        self.client.restore_slot(self.id, path.name)

    def try_restore(self, path: Path) -> tuple[int, str]:
        """HTTP status and message of a restore that should be refused."""
        return self._try(f"/slots/{self.id}?action=restore", {"filename": path.name})

    def try_memory(self, memory: bytes, *, in_request: bool) -> tuple[int, str]:
        """The same of a memory alone: given to the slot, or brought along by a request."""
        data = encoded_memory(memory)
        if not in_request:
            return self._try(f"/slots/{self.id}?action=memory-restore", {"memory": data})
        body = {"prompt": self.ids(OTHER), "n_predict": 1, "id_slot": self.id, "rwkv_ms": {"memory": data}}
        return self._try("/completion", body)

    def _try(self, path: str, body: dict[str, Any]) -> tuple[int, str]:
        response = self.client.request("POST", path, json=body)
        try:
            return response.status_code, str(response.json()["error"]["message"])
        except (ValueError, KeyError, TypeError):
            return response.status_code, response.text[:200]

    def remove_files(self) -> None:
        for path in self._files:
            with suppress(OSError):
                path.unlink(missing_ok=True)
