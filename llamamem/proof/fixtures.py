"""Runs layer fixtures through the NumPy oracle and the compiled op, and reports how far each tensor is off."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from llamamem.formats.fixture import DELTAS, FEATURES, FixtureSequence, LayerFixture, read_fixture
from llamamem.reference import oracle
from llamamem.reference.oracle import LayerTrace, MemoryShape
from llamamem.reference.require import require_torch

Engine = Callable[..., LayerTrace]

# of a padding token only these are defined (all zero); its routes and features are not compared
PADDED = ("raw_read", "out", *DELTAS)


@dataclass(frozen=True)
class FixtureReport:
    """How far an engine is from one fixture: largest absolute difference by tensor; NaN where either side has one."""

    path: Path
    engine: str
    atol: float
    tensors: dict[str, float]

    @property
    def max_abs_diff(self) -> float:
        """The largest difference, NaN if any is."""
        return float(np.max(list(self.tensors.values())))

    @property
    def ok(self) -> bool:
        """Whether every difference is a number within atol."""
        return self.max_abs_diff <= self.atol

    def as_json(self) -> dict[str, object]:
        """Plain values; a difference that is not a number is null."""
        return {
            "file": str(self.path),
            "engine": self.engine,
            "ok": self.ok,
            "max_abs_diff": _number(self.max_abs_diff),
            "tensors": {name: _number(diff) for name, diff in self.tensors.items()},
        }


def engine(name: str) -> Engine:
    """The function behind an engine's name: `numpy` is the oracle, `native` the compiled op, `torch` the reference."""
    if name == "numpy":
        return oracle.eval_layer
    if name == "torch":
        require_torch("--engine torch")
        from llamamem.reference import torch_memory  # only here: it is optional

        return torch_memory.eval_layer
    from llamamem.native.layer import eval_layer  # only here: it needs a build and the bindings

    return eval_layer


def check_fixtures(paths: Iterable[str | Path], engines: Iterable[str], atol: float) -> list[FixtureReport]:
    """One report for each file and engine, in that order. Raises LlamamemError for what cannot be run."""
    runs = {name: engine(name) for name in engines}
    fixtures = [read_fixture(path) for path in paths]
    return [check_fixture(fixture, name, run, atol) for fixture in fixtures for name, run in runs.items()]


def check_fixture(fixture: LayerFixture, name: str, run: Engine, atol: float) -> FixtureReport:
    """Runs every sequence of a fixture and keeps the largest difference of each tensor."""
    shape = MemoryShape(**fixture.rules)
    tensors = _compare(fixture, run, shape)
    final = _with_final_gates(fixture)
    if final is not None and not FixtureReport(fixture.path, name, atol, tensors).ok:
        tensors = _compare(final, run, shape)
    return FixtureReport(fixture.path, name, atol, tensors)


def _with_final_gates(fixture: LayerFixture) -> LayerFixture | None:
    """A semantics 2 file of features may hold the gates from before keep = 1 and erase = write were set."""
    if fixture.weights is not None or fixture.rules["semantics"] != 2:
        return None

    def final(sequence: FixtureSequence) -> FixtureSequence:
        assert sequence.features is not None
        f = sequence.features.reshape(len(sequence.features), len(FEATURES), -1).copy()
        f[:, FEATURES.index("keep")] = 1
        f[:, FEATURES.index("erase")] = f[:, FEATURES.index("write")]
        return replace(sequence, features=f.reshape(len(f), -1))

    return replace(fixture, sequences=tuple(final(sequence) for sequence in fixture.sequences))


def _compare(fixture: LayerFixture, run: Engine, shape: MemoryShape) -> dict[str, float]:
    worst: dict[str, float] = {}
    for sequence in fixture.sequences:
        trace = run(
            fixture.weights,
            h=sequence.h,
            features=sequence.features,
            S=sequence.S,
            prev=sequence.prev,
            n_past=sequence.n_past,
            shape=shape,
            mask=np.where(sequence.live, oracle.LIVE, oracle.PADDING).astype(np.int32),
        )
        for name, want in sequence.expected.items():
            got = np.asarray(trace[name])
            if name in DELTAS:
                got = got[fixture.delta_rows]
            if not name.startswith("final_"):
                rows = np.ones(len(want), bool) if name in PADDED else sequence.live
                got, want = got.reshape(len(got), -1)[rows], want.reshape(len(want), -1)[rows]
            diff = np.abs(got.astype(np.float64).reshape(want.shape) - want)
            worst[name] = float(np.max([worst.get(name, 0.0), diff.max(initial=0.0)]))
    return worst


def _number(x: float) -> float | None:
    return x if math.isfinite(x) else None
