"""Recall across a dropped KV cache, on a running server: facts in one conversation, questions in another.

Each answer is asked for three times: on the memory of the conversation that stated the facts, on none, and on that of
another conversation. Nothing else is left of the first conversation: a memory of some kilobytes is all that moves, in
the requests and the answers.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from llamamem.reference import language
from llamamem.serving.client import Client, decoded_memory, encoded_memory

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
    *,
    rows: tuple[tuple[int, int], ...] = ROWS,
    episodes: int = 200,
    seed: int = 1,
    show: Callable[[int, int], None] = lambda done, total: None,
) -> RecallReport:
    """Measures each row over fresh episodes of the seed."""
    measured, size = [], 0
    done, total = 0, len(rows) * episodes
    for facts, gap in rows:
        rng = random.Random(f"recall {seed} {facts} {gap}")
        right = dict.fromkeys((WITH, WITHOUT, FOREIGN), 0)
        _, other = tell(client, language.episode(rng, facts, gap).conversation)
        for _ in range(episodes):
            episode = language.episode(rng, facts, gap)
            _, memory = tell(client, episode.conversation)
            size = len(memory)
            for name, surname in episode.facts.items():
                for how, given in ((WITH, memory), (WITHOUT, None), (FOREIGN, other)):
                    right[how] += ask(client, name, given) == surname
            other = memory
            done += 1
            show(done, total)
        n = facts * episodes
        measured.append(Row(facts, gap, episodes, n, right[WITH] / n, right[WITHOUT] / n, right[FOREIGN] / n))
    return RecallReport(tuple(measured), size)


def tell(client: Client, conversation: language.Messages) -> tuple[str, bytes]:
    """Has the conversation on an empty memory. The model gives the last answer itself; it, and the memory after it."""
    setting = {"memory": None, "return_memory": True}
    answer = client.chat(conversation[:-1], max_tokens=_ANSWER, cache_prompt=False, rwkv_ms=setting)
    return _said(answer), decoded_memory(answer.get("rwkv_ms"), str(client.url))


def ask(client: Client, name: str, memory: bytes | None) -> str | None:
    """The surname that the model gives, in a new conversation on that memory, or on none."""
    question = [{"role": "user", "content": language.question(name)}]
    setting = {"memory": encoded_memory(memory)}
    answer = client.chat(question, max_tokens=_ANSWER, cache_prompt=False, rwkv_ms=setting)
    return language.surname_in(_said(answer), name)


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
