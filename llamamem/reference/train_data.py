"""What an adapter is trained on: conversations in which the memory goes on and the KV cache does not.

One example is one memory from its beginning: sessions, each read with an empty KV cache, the memory carried from one to
the next. As JSON Lines, one example a line:

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"sessions": [[{"role": "user", ...}, ...], [{"role": "user", ...}, ...]]}
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamamem.errors import LlamamemError
from llamamem.reference import language
from llamamem.reference.chat_tokens import ChatTokens
from llamamem.reference.demo_tokenizer import SPACE


@dataclass(frozen=True)
class Session:
    """Token ids, the weight of each in the loss, and where those stand that only the memory can know."""

    ids: list[int]
    weights: list[float]
    answers: list[int]


Example = list[Session]


@dataclass(frozen=True)
class Stage:
    """A step of the recall task's curriculum. It ends after `steps`, or when recall reaches `until` before."""

    facts: int  # at most
    gap: int  # tokens after the last fact, at most
    steps: int
    batch: int
    until: float = 1.1  # over the last 20 steps


# Few facts and short gaps first; then longer ones, which is what a memory is for.
CURRICULUM = (
    Stage(1, 9, 150, 24, 0.90),
    Stage(2, 16, 250, 24, 0.90),
    Stage(4, 32, 250, 20, 0.92),
    Stage(6, 48, 200, 20, 0.93),
    Stage(8, 64, 300, 20, 0.95),
    Stage(8, 200, 120, 16),
    Stage(8, 500, 120, 10),
    Stage(8, 200, 150, 20),
)
_ASKED = 4  # questions at most; each is a token to learn from and twenty to read
_REPLIES = 0.25  # share of batches in which "ok." is learnt too: it is known, and must not be unlearnt
_SAID_WEIGHT = 0.02  # of what the model says, but for surnames


@dataclass(frozen=True)
class RecallTask:
    """People are introduced in one session; who they were is asked in the next, with nothing left but the memory."""

    chat: ChatTokens

    def batch(self, rng: random.Random, stage: Stage) -> list[Example]:
        """Mostly as hard as the stage, sometimes easier: what was learnt before must not be forgotten."""
        replies = rng.random() < _REPLIES
        return [self._example(rng, stage, replies) for _ in range(stage.batch)]

    def hard(self, rng: random.Random, stage: Stage, n: int) -> list[Example]:
        """Examples to judge by: each as hard as the stage."""
        return [self._told(rng, stage.facts, stage.gap, replies=False) for _ in range(n)]

    def _example(self, rng: random.Random, stage: Stage, replies: bool) -> Example:
        hard = rng.random() < 0.75
        n_facts = stage.facts if hard else rng.randint(1, stage.facts)
        gap = stage.gap if hard else rng.randint(0, stage.gap)
        return self._told(rng, n_facts, gap, replies)

    def _told(self, rng: random.Random, n_facts: int, gap: int, replies: bool) -> Example:
        told = language.episode(rng, n_facts, gap, aside=0.1)
        asked = rng.sample(list(told.facts), min(_ASKED, n_facts))
        questions = language.turns(
            [language.question(name) for name in asked], [language.answer(name, told.facts[name]) for name in asked]
        )
        return [self._session(told.conversation, replies, asks=False), self._session(questions, True, asks=True)]

    def _session(self, messages: language.Messages, learns: bool, asks: bool) -> Session:
        tokens = self.chat.encode(messages)
        answers = [i for i, token in enumerate(tokens.ids) if token in self._surnames] if asks else []
        weights = [_SAID_WEIGHT if said and learns else 0.0 for said in tokens.said]
        for i in answers:
            weights[i] = 1.0
        return Session(tokens.ids, weights, answers)

    @property
    def _surnames(self) -> set[int | None]:
        return {self.chat.id(SPACE + surname) for surname in language.SURNAMES}


def read_examples(path: Path, chat: ChatTokens) -> list[Example]:
    """The conversations of a JSON Lines file; what the assistant says is learnt, and nothing else.

    Raises LlamamemError with the line of the first fault.
    """
    examples = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise LlamamemError(f"{path}: cannot be read ({e})") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            found = json.loads(line)
        except ValueError as e:
            raise LlamamemError(f"{where}: not JSON ({e})") from None
        sessions = [_encoded(chat, messages, where) for messages in _sessions(found, where)]
        if not any(weight for session in sessions for weight in session.weights):
            raise LlamamemError(f"{where}: the assistant says nothing, so there is nothing to learn")
        examples.append(sessions)
    if not examples:
        raise LlamamemError(f"{path}: holds no conversation")
    return examples


def _sessions(found: Any, where: str) -> list[list[dict[str, str]]]:
    if isinstance(found, dict) and len(keys := {"messages", "sessions"} & found.keys()) == 1:
        sessions = found["sessions"] if "sessions" in keys else [found["messages"]]
        if isinstance(sessions, list) and sessions and all(isinstance(s, list) and s for s in sessions):
            if all(_is_message(message) for session in sessions for message in session):
                return sessions
    raise LlamamemError(
        f'{where}: expected {{"messages": [{{"role": ..., "content": ...}}, ...]}}, or "sessions" with a list of such'
    )


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def _encoded(chat: ChatTokens, messages: Sequence[dict[str, str]], where: str) -> Session:
    try:
        tokens = chat.encode(messages)
    except LlamamemError as e:
        raise LlamamemError(f"{where}: {e}") from None
    return Session(tokens.ids, [float(said) for said in tokens.said], [])
