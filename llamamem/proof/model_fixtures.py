"""Runs whole-model fixtures through the PyTorch reference and the runtime, and reports how far they are off."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from llamamem.errors import LlamamemError
from llamamem.formats.model_fixture import Case, ModelFixture, read_model_fixture
from llamamem.reference.require import require_torch

if TYPE_CHECKING:
    from llamamem.native.runtime import Model

LOGITS, STATES = 5e-5, 5e-6  # bounds on absolute differences, of an exact GELU
UBATCHES = (1, 7, 512)

Show = Callable[["CaseReport"], None]


class Measured(NamedTuple):
    """What an engine made of a case; S and prev have the target layer first."""

    logits: np.ndarray  # [n, V]
    S: np.ndarray | None = None
    prev: np.ndarray | None = None
    pos: np.ndarray | None = None


@dataclass(frozen=True)
class CaseReport:
    """How far an engine is from one case: largest absolute differences, NaN where either side has one."""

    fixture: Path
    case: str
    engine: str  # with its setting
    logits: float
    argmax_differences: int
    states: float | None  # None: the fixture has none, or the case is the base
    counters_equal: bool
    atol: float
    atol_states: float

    @property
    def ok(self) -> bool:
        return self.logits <= self.atol and self.counters_equal and (self.states or 0.0) <= self.atol_states

    def as_json(self) -> dict[str, Any]:
        """Plain values; a difference that is not a number is null."""
        return {
            "fixture": str(self.fixture),
            "case": self.case,
            "engine": self.engine,
            "ok": self.ok,
            "logits": _number(self.logits),
            "argmax_differences": self.argmax_differences,
            "states": None if self.states is None else _number(self.states),
            "counters_equal": self.counters_equal,
        }


def check_model_fixture(
    path: str | Path,
    engine: str,
    *,
    atol: float = LOGITS,
    atol_states: float = STATES,
    ubatches: tuple[int, ...] = UBATCHES,
    sidecar: Path | None = None,
    row_order: str | None = None,
    bin_dir: Path | None = None,
    show: Show = lambda report: None,
) -> list[CaseReport]:
    """Runs every case of a folder. `engine` is torch, or native: the build with the exact GELU, at each microbatch.

    For the runtime sidecars are exported from the folder's checkpoint, unless one is given; `row_order` as there.

    Raises LlamamemError for what cannot be run.
    """
    fixture = read_model_fixture(path)
    runs = _torch(fixture) if engine == "torch" else _native(fixture, ubatches, sidecar, row_order, bin_dir)
    reports = []
    for case, how, measured in runs:
        reports.append(compare(fixture.path, case, how, measured, atol, atol_states))
        show(reports[-1])
    return reports


def compare(path: Path, case: Case, how: str, got: Measured, atol: float, atol_states: float) -> CaseReport:
    """Holds what an engine made against a case."""
    if got.logits.shape != case.logits.shape:
        raise LlamamemError(
            f"{path}: {case.name} has logits {list(case.logits.shape)}, the model's are {list(got.logits.shape)}"
        )
    far = [
        _far(path, f"{case.name}: {name}", measured, case.state[name])
        for name, measured in (("S", got.S), ("prev", got.prev))
        if measured is not None and name in case.state
    ]
    counters = got.pos is None or "pos" not in case.state or np.array_equal(got.pos, case.state["pos"].ravel())
    return CaseReport(
        path,
        case.name,
        how,
        _far(path, case.name, got.logits, case.logits),
        int((got.logits.argmax(1) != case.logits.argmax(1)).sum()),
        float(np.max(far)) if far else None,
        bool(counters),
        atol,
        atol_states,
    )


def _far(path: Path, what: str, a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference; axes of one entry may be there or not."""
    if a.size != b.size:
        raise LlamamemError(f"{path}: {what} has shape {list(b.shape)}, the model's is {list(a.shape)}")
    return float(np.abs(a.astype(np.float64).ravel() - b.ravel()).max(initial=0.0))


def _torch(fixture: ModelFixture) -> Iterator[tuple[Case, str, Measured]]:
    require_torch("--engine torch")
    from llamamem.reference.attach import attach
    from llamamem.reference.base import load_base
    from llamamem.reference.conversation import Conversation

    has_weights = any(fixture.path.glob("*.safetensors"))
    base = load_base(fixture.path, weights=None if has_weights else fixture.gguf)
    for config in (None, *fixture.configs):
        memory = None if config is None else attach(base.model, fixture.path, config)
        for case in (case for case in fixture.cases if case.config == config):
            conversation = Conversation(base, memory)
            if case.before is not None:
                conversation.feed(case.before.tolist())
                conversation.drop_text()
            if memory is not None:
                memory.frozen = case.frozen
            pieces = [[token] for token in case.ids.tolist()] if case.step else [case.ids.tolist()]
            logits = np.concatenate([conversation.feed(piece, every=True).numpy() for piece in pieces])
            if memory is None:
                yield case, "torch", Measured(logits)
                continue
            memory.frozen = False
            states = list(memory.state.values())
            S, prev, n = (np.stack([value[0].numpy() for value in values]) for values in zip(*states, strict=True))
            yield case, "torch", Measured(logits, S, prev, n)
        if memory is not None:
            memory.remove()


def _native(
    fixture: ModelFixture, ubatches: tuple[int, ...], given: Path | None, row_order: str | None, bin_dir: Path | None
) -> Iterator[tuple[Case, str, Measured]]:
    from llamamem.formats.sidecar.export import export_sidecar
    from llamamem.native.runtime import Model, load_library

    gguf = fixture.gguf
    if gguf is None:
        raise LlamamemError(f"{fixture.path}: holds no GGUF of the base, which the runtime needs")
    load_library(exact_gelu=True, bin_dir=bin_dir)
    with tempfile.TemporaryDirectory(prefix="llamamem-fixture-") as scratch:
        for i, config in enumerate((None, *fixture.configs)):
            sidecar = None if config is None else given or Path(scratch) / f"memory-{i}.gguf"
            if sidecar is not None and sidecar != given:
                export_sidecar(fixture.path, gguf, sidecar, config=config, row_order=row_order)
            with Model.open(gguf, sidecar, untested=True) as model:  # this is the test
                for case in (case for case in fixture.cases if case.config == config):
                    for n_ubatch in (1,) if case.step else ubatches:
                        how = "native, step" if case.step else f"native, -ub {n_ubatch}"
                        yield case, how, _run(model, case, n_ubatch, Path(scratch) / "before.memory")


def _run(model: Model, case: Case, n_ubatch: int, kept: Path) -> Measured:
    """A memory of another text comes from a file, into a context whose text is empty."""
    from llamamem.native.runtime import Context

    n_ctx = max(len(case.ids), 0 if case.before is None else len(case.before))
    if case.before is not None:
        with Context(model, n_ctx, n_ubatch) as context:
            context.feed(case.before)
            context.save_memory(kept)
    with Context(model, n_ctx, n_ubatch) as context:
        if case.before is not None:
            context.load_memory(kept)
        if case.frozen:
            context.set_memory(frozen=True)
        pieces = np.split(case.ids, len(case.ids)) if case.step else [case.ids]
        logits = np.concatenate([context.decode(piece, at) for at, piece in enumerate(pieces)])
        return Measured(logits, *(_stacked(context.states()) if case.config else ()))


def _stacked(states: list[Any]) -> tuple[np.ndarray, ...]:
    return tuple(np.stack([np.asarray(value) for value in values]) for values in zip(*states, strict=True))


def _number(x: float) -> float | None:
    return x if np.isfinite(x) else None
