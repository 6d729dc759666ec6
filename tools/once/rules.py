"""What a session must remember, told from the texts alone: the rules of docs/service.md, written a second time."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from entitled.fresh import Fresh, Reference
from entitled.memory import EMPTY, PLAIN, Memory


@dataclass(frozen=True)
class Said:
    role: str  # user, assistant, system
    text: str


Talk = tuple[Said, ...]


@dataclass(frozen=True)
class Open:
    """The open conversation: its id, what was asked last, and all exchanges of it, those that were edited away too."""

    id: str | None
    raw: bool
    asked: Talk
    exchanges: tuple[tuple[str, str], ...]
    only: bool


@dataclass(frozen=True)
class Known:
    """A session: the memory at the end of its last finished conversation, the open one, the memory after that."""

    finished: Memory = EMPTY
    open: Open | None = None
    newest: Memory = EMPTY
    generation: int = 0

    def runs_on(self, id: str | None, talk: Talk, raw: bool) -> tuple[bool, Memory]:
        """Whether a request goes on with the open conversation, and the memory that it must run on."""
        on = self.open is not None and _goes_on(self.open, id, talk, raw)
        return on, self.finished if on else self.newest

    def answered(self, id: str | None, talk: Talk, raw: bool, answer: str, memory: Memory) -> Known:
        on, origin = self.runs_on(id, talk, raw)
        before = self.open.exchanges if on and self.open else ()
        only = not (on and self.open and _has_answer(self.open, talk, raw))
        asked = _plain(talk)
        exchange = (asked[-1].text if not raw else _raw(talk), answer)
        opened = Open(id, raw, asked, (*before, exchange), only)
        return Known(origin, opened, memory, self.generation + 1)


def _goes_on(open_: Open, id: str | None, talk: Talk, raw: bool) -> bool:
    if id is not None or open_.id is not None:
        return id == open_.id
    if raw != open_.raw:
        return False
    return (open_.only and open_.asked == _plain(talk)) or _has_answer(open_, talk, raw)


def _has_answer(open_: Open, talk: Talk, raw: bool) -> bool:
    """That it begins as the conversation did and has an answer of ours, or has a whole exchange of ours."""
    if raw:
        return any(
            answer.strip() and _raw(talk).startswith(asked + answer.rstrip()) for asked, answer in open_.exchanges
        )
    plain = _plain(talk)
    users = [said.text.strip() for said in plain if said.role == "user"]
    ours = {answer.strip() for _, answer in open_.exchanges}
    pairs = {(a.text.strip(), b.text.strip()) for a, b in pairwise(plain) if b.role == "assistant"}
    first = next((said.text.strip() for said in open_.asked if said.role == "user"), None)
    same = bool(users) and users[0] == first and any(s.text.strip() in ours for s in plain if s.role == "assistant")
    return same or bool(pairs & {(asked.strip(), answer.strip()) for asked, answer in open_.exchanges})


def _plain(talk: Talk) -> Talk:
    return tuple(said for said in talk if said.role != "system")


def _raw(talk: Talk) -> str:
    return raw_prompt(talk)


def raw_prompt(talk: Talk) -> str:
    """As a client writes it that builds the text itself."""
    turns = "".join(f"<|turn>{'model' if s.role == 'assistant' else 'user'}\n{s.text}<turn|>\n" for s in talk)
    return turns + "<|turn>model\n"


@dataclass
class Fresher:
    """A server of its own, which reads just the text that it is given: what a memory must be."""

    reference: Reference
    server: Any
    _prompts: dict[Talk, str] = field(default_factory=dict)
    _lock: threading.RLock = field(default_factory=threading.RLock)  # it has one slot, which is given memories

    def after(self, origin: Memory, talk: Talk, raw: bool, answer: str, cut: bool) -> Memory:
        """The memory after an answer. The last token of one that was `cut` is not written yet."""
        with self._lock:
            said = self.reference.ids(answer) if answer else ()
            return self.reference.memory(origin, PLAIN, (*self.ids(talk, raw), *(said[:-1] if cut else said)))

    def answer(self, origin: Memory, talk: Talk, raw: bool, n: int) -> Fresh:
        with self._lock:
            return self.reference.answer(origin, PLAIN, self.ids(talk, raw), n)

    def n_tokens(self, talk: Talk, raw: bool, answer: str) -> int:
        with self._lock:
            return len(self.ids(talk, raw)) + (len(self.reference.ids(answer)) if answer else 0)

    def ids(self, talk: Talk, raw: bool) -> tuple[int, ...]:
        with self._lock:
            if raw:
                return self.reference.ids("<bos>" + raw_prompt(talk))
            if talk not in self._prompts:
                messages = [{"role": said.role, "content": said.text} for said in talk]
                reply = self.server.call("POST", "/apply-template", {"messages": messages})
                prompt = str(reply.body["prompt"])
                self._prompts[talk] = prompt if prompt.startswith("<bos>") else "<bos>" + prompt
            return self.reference.ids(self._prompts[talk])


def with_answer(talk: Sequence[Said], answer: str) -> Talk:
    return (*talk, Said("assistant", answer))
