"""A new adapter for training, and the checkpoint directory that training writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llamamem.errors import LlamamemError
from llamamem.formats.checkpoint.writer import write_checkpoint
from llamamem.formats.gguf_file import GgufTensor
from llamamem.reference.adapter import Adapter, rules
from llamamem.reference.attach import attention_layers, projection_widths
from llamamem.reference.torch_memory import Memory

_PREFIX = "model.language_model.layers.{}.self_attn."

# initial values that decide whether recall is learnt at all
_BETA_BIAS = -3.0  # few tokens are worth writing
_W0 = -5.0  # 0.4% of the memory decays with each token
_DELTA_O = 0.02  # a little of the memory is heard from the first step


@dataclass(frozen=True)
class AdapterSpec:
    """What a new adapter is to be; the defaults are those of the published one."""

    layers: tuple[int, ...] = (0, 1, 2, 3, 4, 5)
    rank: int = 8
    states: int = 4
    chunk: int = 1024  # tokens
    alpha: float = 16.0
    semantics: int = 1
    update_mode: str = "standard"
    delta_heads: tuple[str, ...] = ("q", "o")

    def config(self) -> dict[str, Any]:
        """As delta_mem_config.json has it."""
        said: dict[str, Any] = {
            "rank": self.rank,
            "alpha": self.alpha,
            "memory_backend": "rwkv_ms",
            "memory_readout_mode": "delta",
            "couple_lambda": True,
            "state_update_mode": self.update_mode,
            "rankwise_gates": True,
            "num_state_heads": 1,
            "target_layers": list(self.layers),
            "delta_heads": list(self.delta_heads),
            "rwkv_ms_num_states": self.states,
            "rwkv_ms_chunk_size": self.chunk,
            "rwkv_ms_boundary_mode": "fixed_chunk",
            "rwkv_ms_erase_gate": 1.0,
        }
        return said if self.semantics == 1 else said | {"rwkv_ms_semantics_version": self.semantics}


def new_adapter(spec: AdapterSpec, model: nn.Module, seed: int) -> Adapter:
    """An adapter whose memory works from the first step: what was written can be read back, and is heard a little.

    Key and receptance start as the same matrix, the key of the token before and the receptance of this one: so a name
    asks for what came after it. Independent ones did not find each other in training.
    """
    attention = attention_layers(model)
    if wrong := [layer for layer in spec.layers if layer not in attention]:
        raise LlamamemError(f"target layer {wrong[0]} is not one of the base's {len(attention)}; give other --layers")
    hidden = int(attention[0].q_proj.in_features)
    shape, heads, _ = rules(spec.config(), hidden, "the new adapter")
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for layer in spec.layers:
        widths = projection_widths(attention[layer])
        if missing := [head for head in heads if head not in widths]:
            raise LlamamemError(f"layer {layer} of the base has no {missing[0]} projection of its own")
        layers[layer] = Memory(shape, widths, heads)
        start_memory(layers[layer], generator)
    return Adapter(layers, shape, spec.config())


@torch.no_grad()
def start_memory(memory: Memory, generator: torch.Generator) -> None:
    """Gives a memory of zeros the values from which training starts."""

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


def save_adapter(adapter: Adapter, folder: Path, metadata: Mapping[str, Any], *, force: bool = False) -> list[Path]:
    """Writes a checkpoint in the original layout, in fp32: what is read back is exactly what was trained."""
    tensors = []
    for layer, memory in adapter.layers.items():
        for name, tensor in memory.state_dict().items():
            array = tensor.detach().to(torch.float32).cpu().contiguous().numpy()
            tensors.append(GgufTensor(_PREFIX.format(layer) + name, "F32", array.shape, array.tobytes()))
    about = {"memory_type": "delta-mem-rwkv-ms", "wrapped_layers": list(adapter.layers), **metadata}
    return write_checkpoint(folder, tensors, adapter.config, about, format="safetensors", force=force)
