"""Scales a trained memory so that what it keeps is of the order of one.

Training does not care how large a state is, because the group norm behind the read takes its scale away. Numbers do
care: where little answers a read, large terms cancel, and the group norm makes the rounding that is left of them large
again, unless it is small against the norm's epsilon.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from llamamem.reference.attach import Attached
from llamamem.reference.torch_memory import Memory
from llamamem.reference.train import segments
from llamamem.reference.train_data import Example

SOURCE = 1.0  # what no value of the source is to exceed
STATE = 0.25

# these take the source, so they take its scale back
_TAKE_SOURCE = ("receptance.weight", "key.weight", "value.weight", "w1", "a1", "g1")


@torch.no_grad()
def balance(model: nn.Module, handle: Attached, examples: Sequence[Example]) -> dict[int, tuple[float, float]]:
    """Scales the layers in place by powers of two; (source, matrices) by layer are the largest values that were there.

    They are taken at the ends of the segments of `examples`, one batch. Scaling the source changes nothing that the
    layer answers. Scaling the matrices makes reads smaller, of which only two things take notice: the weights of
    several states, and the group norm's epsilon.
    """
    found = dict.fromkeys(handle.adapter.layers, (0.0, 0.0))
    handle.reset()
    for ids, mask, *_ in segments(examples):
        with handle.masked(mask):
            model(input_ids=ids, use_cache=False, logits_to_keep=1)
        for layer, state in handle.state.items():
            source, matrices = found[layer]
            found[layer] = max(source, float(state.prev.abs().max())), max(matrices, float(state.S.abs().max()))
    handle.reset()
    for layer, memory in handle.adapter.layers.items():
        _scale(memory, *found[layer])
    return found


def _scale(memory: Memory, source: float, matrices: float) -> None:
    core = memory.hrm_rwkv7_core
    if memory.shape.semantics == 1:  # in 2 the source is of norm 1
        factor = _down(source, SOURCE)
        memory.get_parameter("memory_v_proj").mul_(factor)
        for name in _TAKE_SOURCE:
            core.at(name).div_(factor)
    core.at("value.weight").mul_(_down(matrices, STATE))


def _down(largest: float, bound: float) -> float:
    """The power of two that brings it under the bound; 1 if it is."""
    return 2.0 ** -max(0, math.ceil(math.log2(largest / bound))) if largest > bound else 1.0
