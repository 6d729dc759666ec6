"""The values that training starts from: the originals', and ours, from which RWKV-MS learns to recall.

The originals' are those of delta-mem 5cd5d91 and of its RWKV-MS backend, where `output_init` is base_slice_fixed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llamamem.reference.torch_delta import DeltaMemory
from llamamem.reference.torch_memory import Memory

ORIGINAL, RECALL = STARTS = ("original", "recall")

# as the originals have them; a config says so
BETA_BIAS = -1.5
GAIN = 0.05  # of the base's columns in a delta
COLUMNS = 8
OUTPUT = 0.02  # deviation of RWKV-MS' output matrix

# ours; they decide whether recall is learnt at all
_BETA_BIAS = -3.0  # few tokens are worth writing
_W0 = -5.0  # 0.4% of the memory decays with each token
_DELTA_O = 0.02  # a little of the memory is heard from the first step


@torch.no_grad()
def start_memory(memory: Memory, generator: torch.Generator) -> None:
    """Gives RWKV-MS of zeros a memory that works from the first step: what was written can be read back.

    Key and receptance start as the same matrix, the key of the token before and the receptance of this one: so a name
    asks for what came after it. Independent ones did not find each other in training.
    """

    def normal(tensor: Tensor, std: float) -> None:
        tensor.normal_(0.0, std, generator=generator)

    core: Any = memory.hrm_rwkv7_core
    width = memory.shape.width
    for name in ("memory_q_proj", "memory_k_proj", "memory_v_proj"):
        normal(memory.get_parameter(name), memory.shape.hidden**-0.5)
    memory.get_parameter("beta_bias").fill_(_BETA_BIAS)
    if "o" in memory.delta_heads:
        normal(memory.get_parameter("delta_o_proj"), _DELTA_O)
    core.x_k.fill_(1.0)
    core.x_a.fill_(0.5)
    core.x_w.fill_(0.5)
    core.w0.fill_(_W0)
    core.k_k.fill_(1.0)
    for x in "wag":
        normal(core.at(f"{x}1"), width**-0.5)
        normal(core.at(f"{x}2"), 0.01)
    core.g2.add_(2 / core.g2.shape[0])  # sigmoid(0) of each, and the gate is 1
    for name in ("receptance", "value", "output"):
        nn.init.orthogonal_(core.at(f"{name}.weight"), generator=generator)
    core.key.weight.copy_(core.receptance.weight)


@torch.no_grad()
def start_delta(memory: DeltaMemory, generator: torch.Generator) -> None:
    """The same for the delta rule: few tokens are written, a read asks for what was written at the same place."""
    for name in ("memory_q_proj", "memory_v_proj"):
        memory.get_parameter(name).normal_(0.0, memory.shape.hidden**-0.5, generator=generator)
    memory.get_parameter("memory_k_proj").copy_(memory.get_parameter("memory_q_proj"))
    memory.get_parameter("beta_bias").fill_(_BETA_BIAS)
    if not memory.shape.couple_lambda:
        memory.get_parameter("lambda_bias").fill_(-_BETA_BIAS)
    if "o" in memory.delta_heads:
        memory.get_parameter("delta_o_proj").normal_(0.0, _DELTA_O, generator=generator)


@torch.no_grad()
def start_as_original(
    memory: Memory | DeltaMemory, base: Mapping[str, Tensor], layer: int, n_layers: int, generator: torch.Generator
) -> None:
    """The originals' values. `base` has the weights of the layer's projections by head."""
    bound = memory.shape.hidden**-0.5  # Kaiming's uniform of a linear layer in PyTorch
    for name in ("memory_q_proj", "memory_k_proj", "memory_v_proj"):
        memory.get_parameter(name).uniform_(-bound, bound, generator=generator)
    memory.get_parameter("beta_bias").fill_(BETA_BIAS)
    if not memory.shape.couple_lambda:
        memory.get_parameter("lambda_bias").fill_(-BETA_BIAS)
    for head in memory.delta_heads:
        columns = nn.functional.normalize(base[head][:, :COLUMNS].float(), dim=0, eps=1e-6)
        memory.get_parameter(f"delta_{head}_proj")[:, : columns.shape[1]] = columns[:, : memory.shape.width] * GAIN
    if isinstance(memory, Memory):
        _start_core(memory.hrm_rwkv7_core, memory.shape.width, memory.shape.rank, layer, n_layers, generator)


def _start_core(core: Any, width: int, rank: int, layer: int, n_layers: int, generator: torch.Generator) -> None:
    """RWKV-7's start, by channel and by how deep the layer lies."""
    depth, rest = layer / max(n_layers - 1, 1), 1.0 - layer / max(n_layers, 1)
    channel = torch.arange(width, dtype=torch.float32)
    line = channel / max(width - 1, 1)
    half = (rank - 1) / 2
    zigzag = (channel % rank - half) / max(half, 1.0)
    zigzag = zigzag * zigzag.abs()
    for name, power in {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}.items():
        core.at(f"x_{name}").copy_(1.0 - (channel / width) ** (power * rest))
    core.w0.copy_(-5.5 + 6 * line ** (1.0 + depth**0.3) + 2.5 * zigzag)
    core.a0.copy_(-0.19 + 0.3 * zigzag + 0.4 * (line - 0.5))
    core.k_k.copy_(0.71 - 0.1 * (line - 0.5))
    core.k_a.fill_(1.02)
    for x in "wag":
        second = core.at(f"{x}2")
        tall = second.shape[0] > second.shape[1]
        gain = (second.shape[0] / second.shape[1]) ** 0.5 if tall else 1.0
        nn.init.orthogonal_(second, gain=0.1 * gain, generator=generator)
    for name, size in {"receptance": 0.5, "key": 0.05, "value": 0.5}.items():
        bound = size * width**-0.5
        core.at(f"{name}.weight").uniform_(-bound, bound, generator=generator)
    nn.init.trunc_normal_(core.output.weight, 0.0, OUTPUT, -3 * OUTPUT, 3 * OUTPUT, generator=generator)
