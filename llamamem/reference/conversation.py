"""A conversation with the reference: text in the KV cache, the memory beside it, and both in step.

The rules are those of the server: a memory that was loaded is what every new text starts on, and text that is not a
continuation of what went through so far starts anew there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamamem.errors import LlamamemError
from llamamem.formats.state import Identity, State
from llamamem.reference.attach import Attached
from llamamem.reference.base import Base, Messages, follow
from llamamem.reference.torch_memory import MemoryState

Choose = Callable[[Tensor], int]  # a token, of the logits [V]

_PIECE = 512  # tokens a pass: bounds what attention needs at a time


@dataclass(frozen=True)
class Answer:
    """New tokens and the logits that each was chosen by, [n, V] fp32. The last one did not go through the model."""

    prompt: list[int]
    ids: list[int]
    logits: Tensor
    stopped: bool  # by a stop token, which is the last one

    @property
    def shown(self) -> list[int]:
        """Without the stop token."""
        return self.ids[:-1] if self.stopped else self.ids


@dataclass(frozen=True)
class Snapshot:
    """Everything of a conversation, to go back to."""

    tokens: list[int]
    ids: list[int]
    messages: list[dict[str, str]]
    cache: Any
    memory: dict[int, MemoryState]
    origin: dict[int, MemoryState]
    seen: dict[int, int]


class Conversation:
    """One sequence of a base, with a memory or (`memory=None`) without."""

    def __init__(self, base: Base, memory: Attached | None = None):
        self.base = base
        self.memory = memory
        self.tokens: list[int] = []  # what the KV cache holds
        self.ids: list[int] = []  # the text: the last token that was chosen need not have gone through the model
        self.messages: list[dict[str, str]] = []
        self._cache: Any = None
        self._origin: dict[int, MemoryState] = {}
        self._written: int | None = None  # tokens that the memory must have; None: it says itself
        self.reset()

    def say(self, text: str, max_new_tokens: int, choose: Choose | None = None) -> Answer:
        """The answer to a user's turn, which goes on from the tokens so far, not from their text."""
        self.messages.append({"role": "user", "content": text})
        new = follow(self.base.prompt_text, self.messages, self.base.end_of(self.ids))
        answer = self.answer([*self.ids, *self.base.tokenize(new, special=True)], max_new_tokens, choose)
        self.messages.append({"role": "assistant", "content": self.base.text(answer.shown)})
        return answer

    def ask(self, messages: Messages, max_new_tokens: int, choose: Choose | None = None) -> Answer:
        """The answer to a whole conversation, of which only what is new goes through the model."""
        return self.answer(self.base.prompt(messages), max_new_tokens, choose)

    def answer(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        choose: Choose | None = None,
        *,
        ban: Collection[int] = (),
        on_token: Callable[[int], None] | None = None,
    ) -> Answer:
        """Goes on after `prompt`, greedily unless told otherwise; tokens of `ban` are never chosen."""
        prompt = list(prompt)
        new = self._new_part(prompt)
        banned = torch.tensor(sorted(ban), dtype=torch.long)
        ids: list[int] = []
        rows: list[Tensor] = []
        while len(ids) < max_new_tokens:
            logits = self.feed(new)[-1]
            rows.append(logits)
            allowed = logits.index_fill(0, banned, -torch.inf) if len(banned) else logits
            ids.append(int(allowed.argmax()) if choose is None else choose(allowed))
            if on_token is not None:
                on_token(ids[-1])
            if ids[-1] in self.base.stop:
                break
            new = ids[-1:]
        self.ids = [*prompt, *ids]
        stopped = bool(ids) and ids[-1] in self.base.stop
        return Answer(prompt, ids, torch.stack(rows) if rows else torch.empty(0, self.base.vocabulary), stopped)

    @torch.no_grad()
    def feed(self, ids: Sequence[int], *, every: bool = False) -> Tensor:
        """Runs tokens after those in the cache; the logits after the last one [1, V], or after each [n, V], fp32."""
        found = []
        every_pass = every or (self.memory is not None and self.memory.needs_all)
        for start in range(0, len(ids), _PIECE):
            piece = list(ids[start : start + _PIECE])
            out = self.base.model(
                input_ids=torch.tensor([piece], device=self.base.model.device),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=0 if every_pass else 1,
            )
            self._cache = out.past_key_values
            self.tokens += piece
            found.append(out.logits[0].float().cpu())
            self._check_step(len(piece))
        return torch.cat(found) if every else found[-1][-1:]

    def drop_text(self) -> None:
        """The KV cache is gone, the memory stays, and the next text starts on it at position 0."""
        self.tokens, self.ids, self.messages, self._cache = [], [], [], None
        self._origin = {} if self.memory is None else self.memory.state

    def reset(self) -> None:
        """Text and memory are gone."""
        if self.memory is not None:
            self.memory.reset()
        self._written = 0
        self.drop_text()

    def save(self, path: str | Path, identity: Identity | None = None) -> State:
        """Writes the memory to a file that the server reads."""
        return self._attached().save(path, identity)

    def load(self, path: str | Path, identity: Identity | None = None) -> State:
        """The text is gone; the next one starts on the memory of the file."""
        return self._started_on(self._attached().load(path, identity))

    def load_bytes(self, data: bytes, identity: Identity | None = None) -> State:
        """The same with the bytes of a file."""
        return self._started_on(self._attached().load_bytes(data, identity))

    def snapshot(self) -> Snapshot:
        """A copy of the text and of the memory."""
        memory, seen = ({}, {}) if self.memory is None else (self.memory.state, dict(self.memory.seen))
        return Snapshot(
            list(self.tokens),
            list(self.ids),
            list(self.messages),
            copy.deepcopy(self._cache),
            memory,
            dict(self._origin),
            seen,
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Goes back to it; it can be used again."""
        self.tokens, self._cache = list(snapshot.tokens), copy.deepcopy(snapshot.cache)
        self.ids, self.messages = list(snapshot.ids), list(snapshot.messages)
        self._origin, self._written = dict(snapshot.origin), None
        if self.memory is not None:
            self.memory.state, self.memory.seen = snapshot.memory, dict(snapshot.seen)

    def _started_on(self, state: State) -> State:
        self._written = None
        self.drop_text()
        return state

    def _new_part(self, prompt: list[int]) -> list[int]:
        """What of a prompt is still to be run; the text starts anew where it is not a continuation."""
        n = len(self.tokens)
        if not prompt:
            raise LlamamemError("the prompt has no tokens")
        if n >= len(prompt) or prompt[:n] != self.tokens:
            if self.memory is not None:
                self.memory.state = self._origin
                self._written = None
            self.tokens, self._cache = [], None
            n = 0
        return prompt[n:]

    def _check_step(self, n: int) -> None:
        """The memory must have gone on by the tokens of this pass and by no others."""
        if self.memory is None or self.memory.faults:
            return
        counted = {int(state.n[0]) for state in self.memory.state.values()}
        expected = None if self._written is None else self._written + (0 if self.memory.frozen else n)
        if len(counted) != 1 or (expected is not None and counted != {expected}):
            raise LlamamemError(
                f"the memory has {sorted(counted)} tokens written, the text {expected}; the model was run by something"
                " else than this conversation"
            )
        self._written = counted.pop()

    def _attached(self) -> Attached:
        if self.memory is None:
            raise LlamamemError("this conversation has no memory; attach an adapter")
        return self.memory


def sampler(temperature: float, top_k: int = 0, top_p: float = 1.0, seed: int = 0) -> Choose | None:
    """A way to choose tokens at random; None, which is greedy, at temperature 0. `top_k=0` is off."""
    if temperature == 0 or top_k == 1:
        return None
    generator = torch.Generator().manual_seed(seed)

    def choose(logits: Tensor) -> int:
        values, order = torch.sort(logits / temperature, descending=True)
        if top_k:
            values, order = values[:top_k], order[:top_k]
        p = torch.softmax(values, dim=-1)
        p = torch.where(p.cumsum(dim=-1) - p < top_p, p, 0.0)  # the first one always stays
        return int(order[torch.multinomial(p, 1, generator=generator)])

    return choose
