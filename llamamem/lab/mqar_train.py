"""Trains and measures one run of an MQAR comparison. Needs PyTorch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from llamamem.lab.mqar_model import Mqar, parameters
from llamamem.lab.mqar_plan import Batch, Preset, Run, Segment, tests, training, validation
from llamamem.lab.mqar_task import IGNORED

_TESTED_AT_ONCE = 128  # examples

# after every epoch: how many are done, the loss of its last step, the accuracy of the validation sets
Show = Callable[[int, float, float], None]


def new_model(preset: Preset, run: Run) -> Mqar:
    """The same seed, the same embedding and first block whatever the arm."""
    torch.manual_seed(run.seed)
    return Mqar(run.mixer, preset.vocab, init=preset.init, dropout=preset.dropout)


def train_run(preset: Preset, run: Run, *, device: str = "cpu", show: Show = lambda *args: None) -> dict[str, Any]:
    """What came out, as a line of the results has it; without what says which run it is."""
    began = time.monotonic()
    model = new_model(preset, run).to(device)
    # as in the trainer: a decay of vectors would pull at where gates and decays start
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": preset.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=run.lr)
    held_out = list(validation(preset, run.seed))
    stopped, steps, loss, curve = "epochs", 0, math.nan, []
    for epoch in range(preset.epochs):
        for group in optimizer.param_groups:
            group["lr"] = run.lr * (1 + math.cos(math.pi * epoch / preset.epochs)) / 2
        for batch in training(preset, run.seed, epoch):
            loss = _step(model, optimizer, batch, preset.clip, device)
            steps += 1
            if not math.isfinite(loss):
                break
        seen = accuracy(model, held_out, device)
        curve.append(round(sum(seen.values()) / len(seen), 4))
        show(epoch + 1, loss, curve[-1])
        if not math.isfinite(loss) or curve[-1] >= preset.stop_at:
            stopped = "accuracy" if math.isfinite(loss) else "diverged"
            break
    return {
        "parameters": parameters(model),
        "epochs": len(curve),
        "steps": steps,
        "stopped": stopped,
        "loss": loss if math.isfinite(loss) else None,
        "validation": curve,
        "accuracy": {name: round(value, 6) for name, value in accuracy(model, tests(preset, run.seed), device).items()},
        "seconds": round(time.monotonic() - began, 1),
    }


def _step(model: Mqar, optimizer: torch.optim.Optimizer, batch: Batch, clip: float, device: str) -> float:
    model.train()
    tokens, labels = _on(batch, device)
    asked = labels != IGNORED
    loss = F.cross_entropy(model(tokens, asked), labels[asked])
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if clip:
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return loss.item()


@torch.no_grad()
def accuracy(model: Mqar, sets: Iterable[tuple[Segment, Batch]], device: str = "cpu") -> dict[str, float]:
    """The share of questions whose most likely answer is the right one, by set."""
    model.eval()
    shares = {}
    for part, (tokens, labels) in sets:
        right = total = 0
        for start in range(0, len(tokens), _TESTED_AT_ONCE):
            rows = slice(start, start + _TESTED_AT_ONCE)
            some, wanted = _on((tokens[rows], labels[rows]), device)
            asked = wanted != IGNORED
            right += int((model(some, asked).argmax(-1) == wanted[asked]).sum())
            total += int(asked.sum())
        shares[part.name] = right / total
    return shares


def _on(batch: tuple[np.ndarray, np.ndarray], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, labels = (torch.from_numpy(array).to(device) for array in batch)
    return tokens, labels
