"""What every slot, file and answer must hold, by the two rules alone. No server, no guess at which slot was free.

1. What a slot holds is f(origin, setting, text).
2. A request gets the memory it names, and no other.

So a slot's *own* memory is what an action gave it and the text of the last request that named it. Requests that name no
slot, or bring their memory, are answered from what they bring; where they run is none of the oracle's business.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from entitled.memory import EMPTY, PLAIN, Memory, Setting, text_hash
from entitled.routes import ABSENT, Ask


@dataclass(frozen=True)
class Own:
    """A slot's own memory: f(origin, read, text). `read` is the setting under which the text was read."""

    origin: Memory = EMPTY
    setting: Setting = PLAIN  # by memory-set, for requests that name the slot
    text: tuple[int, ...] = ()
    read: Setting = PLAIN
    given: bool | None = False  # None: the contract leaves it open
    named: bool = False  # by a request that was written, or by a restore; else it shows whose text is in it by chance

    @property
    def continues(self) -> dict[str, Any]:
        """How a save says what it means to continue, and how the server reports it."""
        return {"origin": self.origin.origin, "n_text": len(self.text), "text": text_hash(self.text)}

    def after(self, setting: Setting, text: tuple[int, ...]) -> Own:
        """Having answered a request that named it. A memory that was only read is as it was."""
        return self if setting.frozen else replace(self, text=text, read=setting, named=True)


class Run(NamedTuple):
    """What an answer is computed from, but for its text."""

    origin: Memory
    setting: Setting
    names_slot: bool


@dataclass
class Oracle:
    n_slots: int
    own: list[Own] = field(init=False)
    memories: dict[str, Memory] = field(default_factory=dict)  # files of memories, by name
    slot_files: dict[str, Own] = field(default_factory=dict)  # files of whole slots

    def __post_init__(self) -> None:
        self.restarted()

    def restarted(self) -> None:
        """A new process: the slots are empty, the files are there."""
        self.own = [Own() for _ in range(self.n_slots)]

    def run_of(self, ask: Ask) -> Run:
        if ask.memory is ABSENT and ask.slot is not None and ask.slot >= 0:
            own = self.own[ask.slot]
            return Run(own.origin, own.setting.under(ask.frozen, ask.scale), True)
        memory = EMPTY if ask.memory is ABSENT or ask.memory is None else ask.memory
        return Run(memory, PLAIN.under(ask.frozen, ask.scale), False)

    def restored(self, slot: int, memory: Memory) -> None:
        self.own[slot] = Own(origin=memory, given=bool(memory.origin) or None, named=True)

    def emptied(self, slot: int) -> None:
        """By memory-reset and erase."""
        self.own[slot] = Own()

    def told(self, slot: int, setting: Setting) -> None:
        """By memory-set: what was learnt stays until the text is read anew under it."""
        self.own[slot] = replace(self.own[slot], setting=setting)

    def slot_restored(self, slot: int, saved: Own) -> None:
        self.own[slot] = replace(saved, setting=PLAIN, given=None)
