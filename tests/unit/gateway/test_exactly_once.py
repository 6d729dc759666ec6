"""tools/exactly_once.py on a server of hashes, where a memory is equal or not: every rule that is broken is found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from entitled.fresh import Reference
from exactly_once import Tally, Turns, run
from fake_llama import FakeModel
from fronts import MakeFront
from memory_store import MemoryStore
from once.rules import Fresher

from llamamem.gateway import turn as turn_module
from llamamem.gateway import turns as turns_module
from llamamem.gateway.held import Held
from llamamem.sessions.session import Conversation


def once(make_front: MakeFront, conversations: int, seed: str) -> tuple[Tally, list[str]]:
    store, model = MemoryStore(), FakeModel()
    fronts = [make_front(store, lease=20.0) for _ in range(2)]
    for front in fronts:
        front.http.close()
    urls = [front.http.base_url for front in fronts]

    def clients() -> list[httpx.Client]:
        return [httpx.Client(base_url=url, timeout=20, trust_env=False) for url in urls]

    return run(conversations, seed, clients, Fresher(Reference(model), model), Turns(0, lambda: None), 4)


def test_nothing_is_wrong_with_two_gateways_on_one_store(make_front: MakeFront) -> None:
    tally, faults = once(make_front, 60, "1")
    assert not faults, "\n".join(faults)
    assert tally.conversations == 60 and tally.turns > 120 and tally.went_on > 50 and tally.furthest == 0
    for what in ("on", "again", "edit", "edit answer", "trim", "trim middle", "branch", "title", "given up", "cancel"):
        assert tally.did[what] > 0, what


def never(*_: Any) -> bool:
    return False


def always(open_: Conversation | None, *_: Any) -> bool:
    return open_ is not None


def first_words_alone(open_: Conversation | None, id: str | None, asked: Any) -> bool:
    return open_ is not None and (id == open_.id if id or open_.id else asked.first == open_.first)


def without_ids(open_: Conversation | None, id: str | None, asked: Any) -> bool:
    return turns_module.goes_on(open_ and open_.model_copy(update={"id": None}), None, asked)


def newest_counts_twice(_: Any, origin: bytes | None) -> Any:
    return None


MUTANTS: dict[str, Callable[[pytest.MonkeyPatch], Any]] = {
    "each request begins a conversation": lambda patch: patch.setattr(turn_module, "goes_on", never),
    "no request begins one": lambda patch: patch.setattr(turn_module, "goes_on", always),
    "the first words decide": lambda patch: patch.setattr(turn_module, "goes_on", first_words_alone),
    "ids are not looked at": lambda patch: patch.setattr(turn_module, "goes_on", without_ids),
}


def keeps_origin(patch: pytest.MonkeyPatch) -> None:
    """The memory of the finished conversation is forgotten: each turn begins on the newest."""
    save = Held.save

    async def wrong(self: Held, memory: Any, conversation: Any = None, origin: Any = None) -> Any:
        return await save(self, memory, conversation, memory.data)

    patch.setattr(Held, "save", wrong)


def saves_nothing(patch: pytest.MonkeyPatch) -> None:
    """What a turn wrote is as it was before."""
    save = Held.save

    async def wrong(self: Held, memory: Any, conversation: Any = None, origin: Any = None) -> Any:
        before = self.record.state if self.record and self.record.state else memory.data
        return await save(
            self, type(memory)(before, memory.tokens, memory.sidecar_sha256, memory.base_sha256), conversation, origin
        )

    patch.setattr(Held, "save", wrong)


def titles_are_turns(patch: pytest.MonkeyPatch) -> None:
    from llamamem.gateway import naming

    patch.setattr(naming, "_mode", lambda *_: "on")


def forgets_exchanges(patch: pytest.MonkeyPatch) -> None:
    after = turn_module.after

    def wrong(open_: Any, went_on: bool, *rest: Any) -> Any:
        return after(None, False, *rest)

    patch.setattr(turn_module, "after", wrong)


MUTANTS |= {wrong.__name__: wrong for wrong in (keeps_origin, saves_nothing, titles_are_turns, forgets_exchanges)}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_rule_that_is_broken_is_found(mutant: str, make_front: MakeFront, monkeypatch: pytest.MonkeyPatch) -> None:
    MUTANTS[mutant](monkeypatch)
    _, faults = once(make_front, 60, "1")
    assert faults
