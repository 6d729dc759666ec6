"""RWKV-MS and the delta rule, matched: the same base, data, seeds, steps and number of trained values.

Every run is a line of a JSON Lines file as soon as it has ended, and what is there is not run again.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from llamamem.errors import LlamamemError
from llamamem.formats.sidecar.layout import DELTA_RULE, RWKV_MS
from llamamem.lab.intervals import interval, shown
from llamamem.lab.tables import Table
from llamamem.reference import language
from llamamem.reference.train import Trainer
from llamamem.reference.train_data import RecallTask, Stage
from llamamem.reference.train_run import Request, trainer_of
from llamamem.reference.trainable import trained_values

KINDS = (RWKV_MS, DELTA_RULE)
_EVALUATED = 16  # episodes at a time


def stages(steps: int, batch: int) -> tuple[Stage, ...]:
    """One fact first, then two at a longer distance."""
    first = 2 * steps // 5
    return Stage(1, 9, first, batch), Stage(2, 16, steps - first, batch)


Show = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What all runs have in common, and how each is judged afterwards: fresh episodes of the last stage's kind."""

    request: Request
    seeds: tuple[int, ...] = (0, 1, 2)
    episodes: int = 128

    @property
    def stage(self) -> Stage:
        return self.request.stages[-1]

    def requests(self) -> dict[str, Request]:
        """By kind; the width of RWKV-MS' low-rank matrices makes the numbers of trained values as equal as can be."""
        own = {kind: replace(self.request, memory=kind) for kind in KINDS}
        adapters = {kind: trainer_of(each).handle.adapter for kind, each in own.items()}
        apart = trained_values(adapters[DELTA_RULE]) - trained_values(adapters[RWKV_MS])
        # six matrices a layer have that width
        step = 6 * self.request.rank * self.request.heads * len(adapters[RWKV_MS].layers)
        lora = self.request.lora + round(apart / step)
        if lora < 1:
            raise LlamamemError("the two kinds cannot be matched on this base; give another --rank")
        return own | {RWKV_MS: replace(own[RWKV_MS], lora=lora)}

    @property
    def key(self) -> str:
        """Of the lines that belong to it."""
        r = self.request
        stages = [[stage.facts, stage.gap, stage.steps, stage.batch, stage.until] for stage in r.stages]
        said = {"base": r.base.name, "start": r.start, "stages": stages, "lr": r.lr, "weight_decay": r.weight_decay}
        said |= {"layers": r.layers, "rank": r.rank, "heads": r.heads, "states": r.states, "chunk": r.chunk}
        return json.dumps(said | {"semantics": r.semantics, "segment": r.segment, "episodes": self.episodes})


@dataclass(frozen=True)
class Line:
    """One run: the shares of surnames that were right after training, and their cross entropy in nats."""

    plan: str
    kind: str
    seed: int
    steps: int
    trained: int  # values
    state_floats: int  # of a layer
    recall: float
    none: float  # recall with no memory
    loss: float
    loss_none: float


def compare(plan: Plan, output: Path, show: Show = lambda text: None) -> list[Line]:
    """Trains and judges what is not yet in `output`, a JSON Lines file, and returns all lines of the plan."""
    there = {(line.kind, line.seed): line for line in read_lines(output) if line.plan == plan.key}
    requests = plan.requests()
    for seed in plan.seeds:
        for kind, request in requests.items():
            if (kind, seed) in there:
                continue
            line = _run(plan, kind, replace(request, seed=seed), show)
            there[kind, seed] = line
            with output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(line)) + "\n")
            show(f"{kind:10} seed {seed}  recall {line.recall:.3f}  loss {line.loss:.3f}")
    return [there[kind, seed] for kind in KINDS for seed in plan.seeds]


def read_lines(path: Path) -> list[Line]:
    """The lines of a file, none if it is not there. Raises LlamamemError for what is none."""
    try:
        return [Line(**json.loads(text)) for text in path.read_text(encoding="utf-8").splitlines() if text.strip()]
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError, ValueError, TypeError) as e:
        raise LlamamemError(f"{path}: is no file of this comparison ({e}); give another --output") from None


def _run(plan: Plan, kind: str, request: Request, show: Show) -> Line:
    trainer = trainer_of(request)
    for progress in trainer.run():
        if progress.step % 50 == 0:
            recall = 0.0 if progress.recall is None else progress.recall
            show(f"{kind:10} seed {request.seed}  step {progress.step}  loss {progress.loss:.3f}  recall {recall:.2f}")
    losses, right = _judged(trainer, plan, request.seed)
    trainer.handle.scale = 0.0
    losses_none, right_none = _judged(trainer, plan, request.seed)
    adapter = trainer.handle.adapter
    one = next(iter(adapter.layers.values())).fresh()
    floats = one.S.numel() + one.prev.numel()
    counts = (trainer.step, trained_values(adapter), floats)
    trainer.handle.remove()
    return Line(
        plan.key, kind, request.seed, *counts, fmean(right), fmean(right_none), fmean(losses), fmean(losses_none)
    )


def _judged(trainer: Trainer, plan: Plan, seed: int) -> tuple[list[float], list[bool]]:
    """Of all answers of fresh episodes, the same ones for both kinds: cross entropy, and whether they are right."""
    assert isinstance(trainer.source, RecallTask)
    rng = random.Random(f"judged {seed}")
    losses, right = [], []
    for _ in range(0, plan.episodes, _EVALUATED):
        batch = trainer.source.hard(rng, plan.stage, _EVALUATED)
        found, answered = trainer.evaluate(batch)
        losses += found
        right += answered
    return losses, right


def table(plan: Plan, lines: Iterable[Line]) -> Table:
    """Recall and loss side by side, means and their 95 % intervals over seeds, and the paired difference."""
    of: dict[str, list[Line]] = {kind: [line for line in lines if line.kind == kind] for kind in KINDS}
    rows = []
    for kind, own in of.items():
        cells = [_mean([getattr(line, name) for line in own]) for name in ("recall", "none", "loss", "loss_none")]
        rows.append((kind, f"{own[0].trained:,}", str(own[0].state_floats), *cells))
    pairs = list(zip(of[RWKV_MS], of[DELTA_RULE], strict=True))
    apart = [shown([getattr(a, name) - getattr(b, name) for a, b in pairs]) for name in ("recall", "loss")]
    rows.append(("difference", "", "", apart[0], "", apart[1], ""))
    stage, seeds, steps = plan.stage, len(plan.seeds), of[RWKV_MS][0].steps
    judged = f"{plan.episodes} fresh episodes a seed, of {stage.facts} facts and a gap of {stage.gap} tokens"
    return Table(
        f"RWKV-MS and delta rule, started as {plan.request.start}",
        ("arm", "trained values", "floats a layer", "recall", "without it", "loss", "without it"),
        tuple(rows),
        f"{seeds} seeds, {steps} steps of {stage.batch} episodes; judged on {judged}; chance is {language.CHANCE:.3f};"
        " ± is a 95 % interval over seeds",
    )


def _mean(values: list[float]) -> str:
    mean, half = interval(values)
    return f"{mean:.3f} ± {half:.3f}" if len(values) > 1 else f"{mean:.3f}"


def as_json(plan: Plan, lines: list[Line]) -> dict[str, Any]:
    return {"plan": json.loads(plan.key), "seeds": list(plan.seeds), "runs": [asdict(line) for line in lines]}
