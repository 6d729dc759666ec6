"""A conversation with the reference runtime from a list of turns, as `llamamem reference run` holds it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llamamem.reference.attach import Attached, attach
from llamamem.reference.base import Base, find_adapter, load_base
from llamamem.reference.conversation import Choose, Conversation


@dataclass(frozen=True)
class Said:
    """One turn: what was asked and answered, the tokens that went through for it, and what was written since reset."""

    prompt: str
    answer: str
    prompt_tokens: int  # new ones
    new_tokens: int
    stopped: bool  # by the model, not by the limit
    tokens_written: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def open_reference(
    base: str, adapter: str | None, *, config: str | None = None, dtype: str = "float32", gelu: str = "exact"
) -> tuple[Base, Attached | None]:
    """Loads a base and attaches an adapter to it; both may be on the Hugging Face hub."""
    source = None if adapter is None else find_adapter(adapter)
    loaded = load_base(base, dtype=dtype, gelu=gelu)
    return loaded, None if source is None else attach(loaded.model, source, config)


def talk(
    base: Base,
    memory: Attached | None,
    turns: Iterable[str],
    *,
    max_new_tokens: int,
    choose: Choose | None = None,
    load: Path | None = None,
    save: Path | None = None,
    show: Callable[[Said], None] = lambda said: None,
) -> list[Said]:
    """Holds the turns one after another; the memory starts from `load` and goes to `save` afterwards."""
    conversation = Conversation(base, memory)
    if save is not None and memory is not None:
        memory.file_identity()  # before anything is said
    if load is not None:
        conversation.load(load)
    found = []
    for text in turns:
        before = len(conversation.tokens)
        answer = conversation.say(text, max_new_tokens, choose)
        new = len(conversation.tokens) - before - len(answer.ids) + 1
        written = 0 if memory is None else max(int(state.n[0]) for state in memory.state.values())
        said = Said(text, base.text(answer.shown), new, len(answer.ids), answer.stopped, written)
        found.append(said)
        show(said)
    if save is not None:
        conversation.save(save)
    return found
