"""What is trained and measured in an MQAR comparison: presets, the runs that they ask for, the data of each.

NumPy alone: `llamamem lab mqar --plan` shows all of it on a machine without PyTorch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np

from llamamem.lab.mqar_task import POWER, examples

ARMS = ("scalar-beta", "vector-beta", "rwkv7", "rwkv-ms", "attention")
BASELINE = "scalar-beta"  # what the others are compared with, pair by pair

_TEST, _VALIDATION = 1, 2  # streams of their own, beside that of training


@dataclass(frozen=True)
class Mixer:
    """An arm at one size. A recurrent state has heads x head x head floats, `rwkv-ms` that of each of its states."""

    arm: str
    width: int  # d, of the model
    heads: int
    head: int  # rows and columns of a head's state
    states: int = 1
    chunk: int = 0  # tokens before the next state is written to, of `rwkv-ms`

    def state_floats(self, length: int) -> int:
        """What is kept between two tokens after `length` of them; attention keeps every key and value."""
        return 2 * length * self.width if self.arm == "attention" else self.heads * self.head**2 * self.states

    @property
    def size(self) -> str:
        """How the state is made up, as the tables have it: heads x k x v, and states."""
        if self.arm == "attention":
            return "2 x tokens x d"
        return f"{self.heads}x{self.head}x{self.head}" + (f" x {self.states}" if self.arm == "rwkv-ms" else "")


class Segment(NamedTuple):
    """A data set: examples of one kind."""

    length: int
    pairs: int
    examples: int

    @property
    def name(self) -> str:
        return f"{self.pairs}@{self.length}"


@dataclass(frozen=True)
class Preset:
    """One comparison. A run stops early at an accuracy of the validation sets, one for each kind of `train`."""

    name: str
    vocab: int
    train: tuple[Segment, ...]  # of an epoch
    test: tuple[Segment, ...]
    mixers: tuple[Mixer, ...]
    lrs: dict[str, tuple[float, ...]]  # by arm
    seeds: tuple[int, ...]
    epochs: int
    batch: int
    fresh: bool  # every epoch has data of its own
    by_turns: bool  # a batch of each segment after the other, instead of one segment after the other
    init: float  # standard deviation of linear maps
    data_seed: int | None = None  # None: the run's own
    dropout: float = 0.0
    weight_decay: float = 0.1
    clip: float = 1.0  # of the gradient's norm; 0: none
    validation: int = 64  # examples a kind
    stop_at: float = 0.99
    power: float = POWER

    @property
    def digest(self) -> str:
        """Of all that decides what a run's figures are; runs of another plan are not taken for these."""
        about = {key: value for key, value in asdict(self).items() if key not in ("name", "mixers", "lrs", "seeds")}
        return hashlib.sha256(repr(sorted(about.items())).encode()).hexdigest()[:12]

    @property
    def main(self) -> int:
        """Floats of the state at which pairs are looked at: the middle size."""
        sizes = sorted({mixer.state_floats(0) for mixer in self.mixers if mixer.arm != "attention"})
        return sizes[len(sizes) // 2]

    def runs(self) -> list[Run]:
        """In an order in which what is there after any time is as even as it can be: the middle size, seed by seed."""
        first = [mixer for mixer in self.mixers if mixer.state_floats(0) in (0, self.main)]
        rest = [mixer for mixer in self.mixers if mixer not in first]
        return [
            Run(mixer, lr, seed)
            for mixers in (first, rest)
            for seed in self.seeds
            for mixer in mixers
            for lr in self.lrs[mixer.arm]
        ]


class Run(NamedTuple):
    mixer: Mixer
    lr: float
    seed: int

    @property
    def key(self) -> str:
        m = self.mixer
        return f"{m.arm} {m.width} {m.heads} {m.head} {m.states} {m.chunk} lr {self.lr:g} seed {self.seed}"


Batch = tuple[np.ndarray, np.ndarray]


def training(preset: Preset, seed: int, epoch: int) -> Iterator[Batch]:
    """The batches of an epoch: the same for every arm and lr, so that runs of a seed are a pair."""
    data_seed = seed if preset.data_seed is None else preset.data_seed
    order = [(i, place) for i, part in enumerate(preset.train) for place in range(part.examples // preset.batch)]
    if preset.by_turns:
        order.sort(key=lambda item: (item[1], item[0]))
    for i, place in order:
        rng = np.random.default_rng([data_seed, 0, epoch if preset.fresh else 0, i, place])
        yield _draw(preset, rng, preset.train[i], preset.batch)


def steps_an_epoch(preset: Preset) -> int:
    return sum(part.examples // preset.batch for part in preset.train)


def tests(preset: Preset, seed: int) -> Iterator[tuple[Segment, Batch]]:
    return _sets(preset, seed, _TEST, preset.test)


def validation(preset: Preset, seed: int) -> Iterator[tuple[Segment, Batch]]:
    kinds = tuple(part._replace(examples=preset.validation) for part in preset.train)
    return _sets(preset, seed, _VALIDATION, kinds)


def _sets(preset: Preset, seed: int, stream: int, parts: tuple[Segment, ...]) -> Iterator[tuple[Segment, Batch]]:
    data_seed = seed if preset.data_seed is None else preset.data_seed
    for i, part in enumerate(parts):
        yield part, _draw(preset, np.random.default_rng([data_seed, stream, i]), part, part.examples)


def _draw(preset: Preset, rng: np.random.Generator, part: Segment, n: int) -> Batch:
    return examples(rng, n, length=part.length, pairs=part.pairs, vocab=preset.vocab, power=preset.power)
