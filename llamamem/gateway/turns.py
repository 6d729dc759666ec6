"""Exactly once: does a request go on with the open conversation of its session, or begin a new one?

A session has M, the memory at the end of its last finished conversation, and one open conversation, whose memory is
f(M, its text). A request that goes on is run on M with its whole text, whatever it is by now; one that begins a new one
makes the memory of the open one M. Of a conversation nothing is kept but hashes of what was said.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from llamamem.sessions.session import Conversation

_MOST = 256  # exchanges that are remembered; of a longer conversation the newest


@dataclass(frozen=True)
class Message:
    role: Literal["user", "assistant", "tool"]
    hash: str


@dataclass(frozen=True)
class Asked:
    """What a request says, without instructions: messages, or a `prompt` alone."""

    messages: tuple[Message, ...] = ()
    prompt: str | None = None

    @property
    def hash(self) -> str:
        if self.prompt is not None:
            return hashed(self.prompt)
        return hashed("\n".join(f"{message.role} {message.hash}" for message in self.messages))

    @property
    def first(self) -> str | None:
        """Its first user message."""
        return next((message.hash for message in self.messages if message.role == "user"), None)


@dataclass(frozen=True)
class Answer:
    """What was said to it: hashes of its messages, or the `text` that went on from a prompt."""

    messages: tuple[str, ...] = ()
    text: str = ""


def goes_on(open_: Conversation | None, id: str | None, asked: Asked) -> bool:
    """The rules of docs/service.md."""
    if open_ is None:
        return False
    if id is not None or open_.id is not None:
        return id == open_.id
    if (open_.kind == "prompt") != (asked.prompt is not None):
        return False
    if open_.only and open_.asked == asked.hash:  # its only exchange once more
        return True
    return _has_answer(open_, asked)


def after(open_: Conversation | None, went_on: bool, id: str | None, asked: Asked, answer: Answer) -> Conversation:
    """The open conversation once the request was answered."""
    before = open_.exchanges if open_ is not None and went_on else ()
    return Conversation(
        kind="messages" if asked.prompt is None else "prompt",
        id=id,
        first=asked.first,
        asked=asked.hash,
        exchanges=tuple(dict.fromkeys((*before, *_exchanges(asked, answer))))[-_MOST:],
        only=not (open_ is not None and went_on and _has_answer(open_, asked)),
    )


def hashed(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def message_hash(text: str, parts: Sequence[Any] = (), calls: Sequence[tuple[str, Any]] = ()) -> str:
    """Of a message: its text, its other parts, the tools that it calls. Blanks around a text are nothing: clients
    differ in what they make of them."""
    if not parts and not calls:
        return hashed(text.strip())
    return hashed(json.dumps([text.strip(), list(parts), [list(call) for call in calls]], sort_keys=True))


def _has_answer(open_: Conversation, asked: Asked) -> bool:
    """That what is asked begins as the conversation did and contains an answer of ours, or has an exchange of it."""
    if asked.prompt is not None:
        return any(_begins(asked.prompt, head) for head in open_.exchanges)
    exchanges = set(open_.exchanges)
    if exchanges & set(_pairs(asked.messages)):  # also where its beginning was trimmed or edited
        return True
    answers = {exchange.rpartition(":")[2] for exchange in exchanges}
    said = {message.hash for message in asked.messages if message.role == "assistant"}
    return asked.first is not None and asked.first == open_.first and bool(answers & said)


def _pairs(messages: Sequence[Message]) -> list[str]:
    return [f"{a.hash}:{b.hash}" for a, b in pairwise(messages) if b.role == "assistant"]


def _exchanges(asked: Asked, answer: Answer) -> list[str]:
    if asked.prompt is not None:
        head = asked.prompt + answer.text.rstrip()
        return [f"{len(head)}:{hashed(head)}"] if answer.text.strip() else []
    said = [asked.messages[-1].hash if asked.messages else "", *answer.messages]
    return [f"{a}:{b}" for a, b in pairwise(said)]


def _begins(prompt: str, head: str) -> bool:
    n, _, hash = head.partition(":")
    return int(n) <= len(prompt) and hashed(prompt[: int(n)]) == hash
