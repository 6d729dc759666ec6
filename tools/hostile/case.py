"""A case of the corpus, and the edits that make one of a sound sidecar."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from hostile.raw import STRING, Key, Sidecar, sound

Edit = Callable[[Sidecar], Any]


class Case(NamedTuple):
    """A file, the reason for which it is refused (None: it is sound), and what each reader's message must name."""

    name: str
    reason: str | None
    names: Sequence[str]
    why: str
    data: bytes


def case(
    name: str, reason: str | None, names: str | Sequence[str], why: str, *edits: Edit, settle: bool = False, **of: Any
) -> Case:
    """A sound sidecar `sound(**of)`, edited. `settle`: with manifest and counts made to fit the tensors again."""
    sidecar = sound(**of)
    for edit in edits:
        edit(sidecar)
    if settle:
        sidecar.settle()
    return Case(name, reason, [names] if isinstance(names, str) else names, why, sidecar.compose())


# for faults that are found before the manifest is asked: with an empty one and three tensors, as the files are many
early = partial(case, head=True)


def put(key: str, value: Any, kind: int | None = None) -> Edit:
    """Another value of a key, and another type if that is given."""

    def edit(sidecar: Sidecar) -> None:
        found = sidecar.key(key)
        found.value, found.type = value, found.type if kind is None else kind

    return edit


def add(name: str | bytes, value: Any, kind: int = STRING, at: int | None = None) -> Edit:
    """One more key, by its whole name."""
    return lambda sidecar: sidecar.keys.insert(len(sidecar.keys) if at is None else at, Key(name, kind, value))


def drop(key: str) -> Edit:
    """Without a key."""
    return lambda sidecar: sidecar.keys.remove(sidecar.key(key))


def member(name: str, value: Any) -> Edit:
    """Another value of a member of config_json."""
    return lambda sidecar: sidecar.config.update({name: value})


def both(name: str, value: Any) -> Edit:
    """Another value of a member of config_json and of the key that has its name."""

    def edit(sidecar: Sidecar) -> None:
        sidecar.config[name] = sidecar.key(name).value = value

    return edit


def part(of: str | bytes | None = None, /, **fields: Any) -> Edit:
    """Sets fields of the file, or of one of its tensors."""

    def edit(sidecar: Sidecar) -> None:
        found = sidecar if of is None else sidecar.tensor(of)
        for field, value in fields.items():
            setattr(found, field, value)

    return edit
