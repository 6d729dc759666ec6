"""The trainer: an adapter on a frozen base, over sessions between which the KV cache is dropped and the memory is not.

Sessions are read in segments. The gradient runs through the memory over all of an example's segments, or over the last
few of them (truncated back-propagation). The same plan, seed and thread count give the same adapter.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llamamem.errors import LlamamemError
from llamamem.reference.attach import Attached
from llamamem.reference.torch_memory import LIVE, PADDING
from llamamem.reference.train_data import Example, RecallTask, Session, Stage

STATE = "trainer_state.pt"

_RECENT = 20  # steps over which recall is taken


@dataclass(frozen=True)
class Plan:
    """How to train. `stages` are those of the recall task; for data of one's own one stage says steps and batch."""

    stages: tuple[Stage, ...]
    lr: float = 5e-3
    weight_decay: float = 0.2  # of matrices
    seed: int = 0
    segment: int = 256  # tokens
    bptt: int = 0  # segments that a gradient runs back over; 0: all of an example's
    shift: float = 0.25  # share of steps in which the counter starts anywhere, so that examples cross chunks
    clip: float = 1.0


@dataclass(frozen=True)
class Progress:
    """Of one step: loss, and the share of answers that were right (None when there are none to know)."""

    step: int
    stage: int
    loss: float
    recall: float | None


@dataclass
class Trainer:
    """`for progress in trainer.run(): ...`; it can be saved between any two steps and resumed."""

    model: nn.Module
    handle: Attached
    plan: Plan
    source: RecallTask | list[Example]
    step: int = 0
    stage: int = 0
    stage_step: int = 0
    recent: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        self.parameters = list(self.handle.layers.parameters())
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        # the group norm behind a read hides how large states are: without decay they grow to 80, and cancel inexactly
        matrices = [parameter for parameter in self.parameters if parameter.ndim > 1]
        vectors = [parameter for parameter in self.parameters if parameter.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": self.plan.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=self.plan.lr, betas=(0.9, 0.99))

    def run(self) -> Iterator[Progress]:
        """Trains to the end of the last stage."""
        while self.stage < len(self.plan.stages):
            yield self.train_step()

    @property
    def total(self) -> int:
        """Steps, if no stage ends early."""
        return sum(stage.steps for stage in self.plan.stages)

    def train_step(self) -> Progress:
        stage = self.plan.stages[self.stage]
        rng = random.Random(f"{self.plan.seed} {self.step}")
        batch = self._draw(rng, stage)
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr(stage)
        self.optimizer.zero_grad(set_to_none=True)
        loss, right = self.backward(batch, rng)
        torch.nn.utils.clip_grad_norm_(self.parameters, self.plan.clip)
        self.optimizer.step()
        progress = Progress(self.step + 1, self.stage, loss, sum(right) / len(right) if right else None)
        if not torch.isfinite(torch.tensor(loss)):
            raise LlamamemError(f"the loss is {loss} at step {progress.step}; give a smaller --lr", exit_status=1)
        self.step += 1
        self.stage_step += 1
        self.recent = [*self.recent, progress.recall or 0.0][-_RECENT:]
        learnt = len(self.recent) == _RECENT and sum(self.recent) / _RECENT >= stage.until
        if self.stage_step >= stage.steps or learnt:
            self.stage, self.stage_step, self.recent = self.stage + 1, 0, []
        return progress

    def backward(self, batch: Sequence[Example], rng: random.Random) -> tuple[float, list[bool]]:
        """Adds the gradients of a batch; its loss a unit of weight, and whether each answer was right."""
        total = sum(sum(session.weights) for example in batch for session in example)
        self._begin(len(batch), rng)
        pending: list[Tensor] = []
        loss, right, segments = 0.0, [], 0
        for losses, _, answered in self._read(batch):
            if losses is not None:
                pending.append(losses.sum() / total)
                right += answered
            segments += 1
            if self.plan.bptt and segments % self.plan.bptt == 0:
                loss += _flush(pending)
                self.handle.detach()
        loss += _flush(pending)
        self.handle.reset()
        return loss, right

    @torch.no_grad()
    def evaluate(self, batch: Sequence[Example]) -> tuple[list[float], list[bool]]:
        """Of each answer that only the memory can know its cross entropy, and whether it was right."""
        self.handle.reset()
        found, right = [], []
        for _, answers, answered in self._read(batch):
            found += answers
            right += answered
        self.handle.reset()
        return found, right

    def _read(self, batch: Sequence[Example]) -> Iterator[tuple[Tensor | None, list[float], list[bool]]]:
        """Of each segment the weighted losses (None: nothing to learn), those of the answers, and which are right."""
        for ids, mask, targets, weights, answers in _segments(batch, self.plan.segment):
            wanted = weights > 0
            places = wanted.any(dim=0).nonzero().flatten()
            with self.handle.masked(mask):
                # logits where there is something to learn; where there is nothing, the layers above are not run
                keep = 0 if self.handle.needs_all else places if len(places) else 1
                logits = self.model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits
            if not len(places):
                yield None, [], []
                continue
            logits = logits[:, places] if self.handle.needs_all else logits
            said, asked = logits[wanted[:, places]], answers[wanted]
            losses = F.cross_entropy(said.float(), targets[wanted], reduction="none")
            right = (said.argmax(-1) == targets[wanted])[asked].tolist()
            yield losses * weights[wanted], losses.detach()[asked].tolist(), right

    def _begin(self, batch: int, rng: random.Random) -> None:
        shape = self.handle.adapter.shape
        start = rng.randrange(max(1, shape.chunk * shape.states)) if rng.random() < self.plan.shift else 0
        fresh = {layer: memory.fresh(batch) for layer, memory in self.handle.adapter.layers.items()}
        self.handle.state = {layer: state._replace(n=state.n + start) for layer, state in fresh.items()}

    def _draw(self, rng: random.Random, stage: Stage) -> list[Example]:
        if isinstance(self.source, RecallTask):
            return self.source.batch(rng, stage)
        first = self.step * stage.batch
        return [self._nth(i) for i in range(first, first + stage.batch)]

    def _nth(self, i: int) -> Example:
        """The i-th example of an endless stream in which every pass over the data has an order of its own."""
        assert isinstance(self.source, list)
        epoch, place = divmod(i, len(self.source))
        order = list(range(len(self.source)))
        random.Random(f"{self.plan.seed} epoch {epoch}").shuffle(order)
        return self.source[order[place]]

    def _lr(self, stage: Stage) -> float:
        """Warms up over 20 steps; in the last stage it falls to a tenth."""
        warm = min(1.0, (self.step + 1) / 20)
        last = self.stage == len(self.plan.stages) - 1
        return self.plan.lr * warm * (1 - 0.9 * self.stage_step / stage.steps if last else 1.0)

    # checkpoints

    def state_dict(self) -> dict[str, Any]:
        counts = {"step": self.step, "stage": self.stage, "stage_step": self.stage_step, "recent": self.recent}
        return {"optimizer": self.optimizer.state_dict(), "plan": repr(self.plan), **counts}

    def load_state(self, path: Path) -> None:
        """Goes on where another trainer of the same plan stopped."""
        try:
            saved = torch.load(path, weights_only=True)
            plan, optimizer = saved["plan"], saved["optimizer"]
            self.step, self.stage, self.stage_step = (int(saved[key]) for key in ("step", "stage", "stage_step"))
            self.recent = [float(recall) for recall in saved["recent"]]
        except FileNotFoundError:
            raise LlamamemError(f"{path}: no such file; there is nothing to resume") from None
        except Exception as e:  # torch.load and a dict of anything fail in many ways
            raise LlamamemError(f"{path}: not the state of a trainer ({e})") from None
        if plan != repr(self.plan):
            raise LlamamemError(f"{path}: is of another plan; resume with the same options: {plan}")
        self.optimizer.load_state_dict(optimizer)


def _flush(pending: list[Tensor]) -> float:
    if not pending:
        return 0.0
    loss = torch.stack(pending).sum()
    loss.backward()
    pending.clear()
    return loss.item()


Piece = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _segments(batch: Sequence[Example], length: int) -> Iterator[Piece]:
    """Ids, mask, and of the next tokens their ids, weights and whether they are answers: [B, T] each."""
    for place in range(max(len(example) for example in batch)):
        sessions = [example[place] if place < len(example) else Session([], [], []) for example in batch]
        longest = max(len(session.ids) for session in sessions)
        size = (len(sessions), longest + 1)
        ids, mask = torch.zeros(size, dtype=torch.long), torch.full(size, PADDING)
        weights, answers = torch.zeros(size), torch.zeros(size, dtype=torch.bool)
        for i, session in enumerate(sessions):
            n = len(session.ids)
            ids[i, :n] = torch.tensor(session.ids)
            mask[i, :n] = LIVE
            weights[i, :n] = torch.tensor(session.weights)
            answers[i, session.answers] = True
        for start in range(0, longest, length):
            end = min(start + length, longest)
            here, following = slice(start, end), slice(start + 1, end + 1)
            yield ids[:, here], mask[:, here], ids[:, following], weights[:, following], answers[:, following]


def train(trainer: Trainer, save: Callable[[], None], every: int, show: Callable[[Progress], None]) -> None:
    """Runs to the end; `save` is called every so many steps and at the end."""
    for progress in trainer.run():
        show(progress)
        if progress.step % every == 0:
            save()
    save()
