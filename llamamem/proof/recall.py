"""Recall across a dropped KV cache, on a running server: facts in one conversation, questions in another.

Each answer is asked for three times: on the memory of the conversation that stated the facts, on none, and on that of
another conversation. Nothing else is left of the first conversation: a memory file of some kilobytes is all that moves.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llamamem.reference import language
from llamamem.serving.client import Client

ROWS = ((1, 64), (2, 64), (4, 64), (8, 64), (12, 64), (4, 16), (4, 250), (4, 500), (4, 1000))  # facts, gap in tokens

WITH, WITHOUT, FOREIGN = "memory", "none", "foreign"

# by number of facts and gap: the least recall with memory; the most without is chance and five points
REQUIRED = {(8, 64): 0.95, (4, 500): 0.90}
ALLOWED = language.CHANCE + 0.05
ENOUGH = 200  # episodes, from which on it is held to the letter

_ANSWER = 8  # tokens


@dataclass(frozen=True)
class Row:
    """Episodes of one kind; the shares are of all questions."""

    facts: int
    gap: int  # tokens at least between the last fact and the end of its conversation
    episodes: int
    questions: int
    memory: float
    none: float
    foreign: float

    @property
    def ok(self) -> bool:
        """As promised; where few episodes were measured, within three standard errors of it."""
        required = REQUIRED.get((self.facts, self.gap), 0.0)
        remembers = self.memory >= required - self._slack(required)
        return remembers and max(self.none, self.foreign) <= ALLOWED + self._slack(ALLOWED)

    def _slack(self, share: float) -> float:
        return 0.0 if self.episodes >= ENOUGH else 3 * math.sqrt(share * (1 - share) / self.questions)


@dataclass(frozen=True)
class RecallReport:
    rows: tuple[Row, ...]
    memory_bytes: int
    chance: float = language.CHANCE

    @property
    def ok(self) -> bool:
        return all(row.ok for row in self.rows)

    def as_dict(self) -> dict[str, Any]:
        rows = [{**asdict(row), "required": REQUIRED.get((row.facts, row.gap)), "ok": row.ok} for row in self.rows]
        return {"ok": self.ok, "chance": self.chance, "memory_bytes": self.memory_bytes, "rows": rows}


def recall(
    client: Client,
    slot_dir: Path,
    *,
    rows: tuple[tuple[int, int], ...] = ROWS,
    episodes: int = 200,
    seed: int = 1,
    slot: int = 0,
    show: Callable[[int, int], None] = lambda done, total: None,
) -> RecallReport:
    """Measures each row over fresh episodes of the seed. `slot_dir` is the server's; its files are taken away again."""
    measured, size = [], 0
    done, total = 0, len(rows) * episodes
    for facts, gap in rows:
        rng = random.Random(f"recall {seed} {facts} {gap}")
        right = dict.fromkeys((WITH, WITHOUT, FOREIGN), 0)
        files = ("recall-0.bin", "recall-1.bin")  # by turns this episode's and that before it
        try:
            tell(client, language.episode(rng, facts, gap).conversation, slot)
            client.save_memory(slot, files[1])
            for i in range(episodes):
                episode, file, other = language.episode(rng, facts, gap), files[i % 2], files[(i + 1) % 2]
                tell(client, episode.conversation, slot)
                client.save_memory(slot, file)
                size = (slot_dir / file).stat().st_size
                for name, surname in episode.facts.items():
                    for how, memory in ((WITH, file), (WITHOUT, None), (FOREIGN, other)):
                        right[how] += ask(client, name, memory, slot) == surname
                done += 1
                show(done, total)
        finally:
            for file in files:
                (slot_dir / file).unlink(missing_ok=True)
        n = facts * episodes
        measured.append(Row(facts, gap, episodes, n, right[WITH] / n, right[WITHOUT] / n, right[FOREIGN] / n))
    return RecallReport(tuple(measured), size)


def tell(client: Client, conversation: language.Messages, slot: int = 0) -> str:
    """Has the conversation in an empty slot; the model gives the last answer itself, which is returned."""
    client.erase_slot(slot)
    return _said(client.chat(conversation[:-1], max_tokens=_ANSWER, id_slot=slot, cache_prompt=False))


def ask(client: Client, name: str, memory: str | None, slot: int = 0) -> str | None:
    """The surname that the model gives, in a new conversation on that memory file, or on no memory."""
    if memory is None:
        client.erase_slot(slot)
    else:
        client.restore_memory(slot, memory)
    question = [{"role": "user", "content": language.question(name)}]
    return language.surname_in(_said(client.chat(question, max_tokens=_ANSWER, id_slot=slot, cache_prompt=False)), name)


def _said(answer: dict[str, Any]) -> str:
    return str(answer["choices"][0]["message"]["content"] or "").strip()


def bars(report: RecallReport, width: int = 24) -> list[str]:
    """The picture in text: one line a row, memory over none."""
    lines = []
    for row in report.rows:
        full, base = round(row.memory * width), round(row.none * width)
        lines.append(f"{row.facts:>5}  {row.gap:>6}  {'█' * full:<{width}} {row.memory:4.0%}")
        lines.append(f"{'':>5}  {'':>6}  {'░' * base:<{width}} {row.none:4.0%}")
    return lines
