"""What the driver does, as values: a step says all that it needs, so that a history can be told again, or shortened."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from entitled.memory import Memory
from entitled.routes import Ask


@dataclass(frozen=True)
class Together:
    """Requests that are under way at the same time."""

    asks: tuple[Ask, ...]

    def __str__(self) -> str:
        return "at the same time:" + "".join(f"\n      {ask}" for ask in self.asks)


@dataclass(frozen=True)
class Action:
    """A slot action that must be done; `told` is its body but for a memory."""

    slot: int
    action: str
    told: tuple[tuple[str, Any], ...] = ()
    memory: Memory | None = None

    @property
    def body(self) -> dict[str, Any]:
        return dict(self.told) | ({} if self.memory is None else {"memory": self.memory.base64})

    def __str__(self) -> str:
        more = " ".join(f"{name}={value}" for name, value in self.told)
        return f"slot {self.slot} {self.action} {more}{'' if self.memory is None else self.memory}"


@dataclass(frozen=True)
class Continue:
    """A memory-save that says what it continues: the first `share` of the slot's text, or something `wrong`."""

    slot: int
    share: float
    wrong: str | None
    filename: str | None

    def __str__(self) -> str:
        return f"slot {self.slot} memory-save continues {self.wrong or f'{self.share:.2f} of its text'} {self.filename}"


@dataclass(frozen=True)
class WhileBusy:
    """An action for a slot that is answering, then another request for that slot.

    `how`: 'waits' for its turn, is given up by the client ('hangs up'), or gives itself 50 ms ('in time').
    """

    before: Ask
    action: Action
    after: Ask
    how: str

    def __str__(self) -> str:
        return f"{self.how}:\n      {self.before}\n      {self.action}\n      {self.after}"


@dataclass(frozen=True)
class Refused:
    """A request that must be a 400 and change nothing."""

    path: str
    body: tuple[tuple[str, Any], ...]

    def __str__(self) -> str:
        return f"must be refused: {self.path} {dict(self.body)}"[:300]


@dataclass(frozen=True)
class Poison:
    """A memory of huge values: its own answer may fail, nobody else's."""

    ask: Ask

    def __str__(self) -> str:
        return f"huge values: {self.ask}"


@dataclass(frozen=True)
class Look:
    """/slots, and every slot's memory saved."""

    def __str__(self) -> str:
        return "look at every slot"


@dataclass(frozen=True)
class Sleep:
    def __str__(self) -> str:
        return "sleep and wake"


Step = Ask | Together | Action | Continue | WhileBusy | Refused | Poison | Look | Sleep
