"""Two steps of training that fail unless something was really trained: memory, gradients, tensors, and the file."""

from __future__ import annotations

import random
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from llamamem.reference.adapter import Adapter, read_adapter
from llamamem.reference.attach import attach
from llamamem.reference.torch_memory import LIVE
from llamamem.reference.train import Trainer
from llamamem.reference.trainable import is_used, save_adapter

_SMALL = 1e-11  # of a gradient: AdamW divides by no less than 1e-8, and a value near 1 is rounded to 6e-8


@dataclass(frozen=True)
class Check:
    what: str
    ok: bool
    seen: str


def train_smoke(trainer: Trainer) -> list[Check]:
    """Runs two steps of `trainer` and says what came of them."""
    adapter = trainer.handle.adapter
    before = _tensors(adapter)
    largest: dict[str, float] = {}  # of a tensor's gradients
    losses = []
    for _ in range(2):
        losses.append(trainer.train_step().loss)
        for name, parameter in _parameters(adapter).items():
            gradient = parameter.grad
            if gradient is not None and torch.isfinite(gradient).all() and gradient.abs().max() > 0:
                largest[name] = max(largest.get(name, 0.0), float(gradient.abs().max()))
    trained = [name for name in before if _is_used(adapter, name)]
    without = [name for name in trained if name not in largest]
    # behind a matrix that starts at zero a gradient may be so small at first that the optimizer makes nothing of it
    heard = [name for name in trained if largest.get(name, _SMALL) >= _SMALL]
    still = [name for name in heard if torch.equal(before[name], _tensors(adapter)[name])]
    norms = _state_norms(trainer)
    same, difference = _reload(trainer)
    return [
        Check("the memory was written", min(norms) > 0, "state norms " + " ".join(f"{norm:.3g}" for norm in norms)),
        Check("every tensor in use has a gradient", not without, _named(without, len(trained))),
        Check("every tensor in use moved", not still, _named(still, len(heard))),
        Check("the base did not", all(p.grad is None for p in trainer.model.parameters()), "no gradient in it"),
        Check("a reload is exact", same, f"largest difference in the logits {difference:g}"),
        Check("the loss is a number", all(loss == loss for loss in losses), " ".join(f"{loss:.4f}" for loss in losses)),
    ]


def _parameters(adapter: Adapter) -> dict[str, nn.Parameter]:
    return {f"{i}.{name}": p for i, memory in adapter.layers.items() for name, p in memory.named_parameters()}


def _tensors(adapter: Adapter) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in _parameters(adapter).items()}


def _is_used(adapter: Adapter, name: str) -> bool:
    layer, _, tail = name.partition(".")
    return is_used(adapter.layers[int(layer)], tail)


def _named(names: list[str], of: int) -> str:
    return f"all {of}" if not names else f"not {len(names)} of {of}: {', '.join(names[:3])}"


def _ids(trainer: Trainer) -> Tensor:
    example = trainer._draw(random.Random(0), trainer.plan.stages[0])[0]
    return torch.tensor([example[0].ids[: trainer.plan.segment]])


@torch.no_grad()
def _state_norms(trainer: Trainer) -> list[float]:
    ids = _ids(trainer)
    trainer.handle.reset()
    with trainer.handle.masked(torch.full(ids.shape, LIVE)):
        trainer.model(input_ids=ids, use_cache=False)
    norms = [float(state.S.norm()) for state in trainer.handle.state.values()]
    trainer.handle.reset()
    return norms


@torch.no_grad()
def _reload(trainer: Trainer) -> tuple[bool, float]:
    """Whether a saved and read adapter has the same tensors and gives the same logits."""
    ids, model = _ids(trainer), trainer.model
    first = model(input_ids=ids, use_cache=False).logits
    trainer.handle.remove()
    with tempfile.TemporaryDirectory(prefix="llamamem-train-") as folder:
        save_adapter(trainer.handle.adapter, Path(folder) / "adapter", {})
        again = read_adapter(Path(folder) / "adapter")
    handle = attach(model, again)
    second = model(input_ids=ids, use_cache=False).logits
    handle.remove()
    saved, read = _tensors(trainer.handle.adapter), _tensors(again)
    same = saved.keys() == read.keys() and all(torch.equal(saved[name], read[name]) for name in saved)
    return same and torch.equal(first, second), float((first - second).abs().max())
