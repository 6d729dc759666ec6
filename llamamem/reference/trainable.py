"""A new adapter for training, and the checkpoint directory that training writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llamamem.errors import LlamamemError
from llamamem.formats.checkpoint.writer import write_checkpoint
from llamamem.formats.gguf_file import GgufTensor
from llamamem.formats.sidecar.layout import DELTA_RULE, RWKV_MS, SOURCE_PREFIX
from llamamem.reference import starts
from llamamem.reference.adapter import Adapter, Layer, Shape, rules
from llamamem.reference.attach import attention_layers, hidden_width, projection_widths, projections
from llamamem.reference.delta_oracle import DeltaShape
from llamamem.reference.starts import start_memory
from llamamem.reference.torch_delta import DeltaMemory
from llamamem.reference.torch_memory import Memory

__all__ = ["AdapterSpec", "new_adapter", "save_adapter", "start_memory", "trained_values"]


@dataclass(frozen=True)
class AdapterSpec:
    """What a new adapter is to be; the defaults are those of the published RWKV-MS. No layers: all of them."""

    memory: str = RWKV_MS  # one of sidecar.layout.MEMORY_KINDS
    layers: tuple[int, ...] = (0, 1, 2, 3, 4, 5)
    rank: int = 8
    heads: int = 1  # state heads
    states: int = 4  # of RWKV-MS, as the next two and `lora`
    chunk: int = 1024  # tokens
    semantics: int = 1
    lora: int = 32
    alpha: float = 16.0
    update_mode: str = "standard"
    delta_heads: tuple[str, ...] = ("q", "o")
    start: str = starts.RECALL  # one of starts.STARTS

    def config(self) -> dict[str, Any]:
        """As delta_mem_config.json of its kind has it."""
        said: dict[str, Any] = {
            "rank": self.rank,
            "alpha": self.alpha,
            "memory_readout_mode": "delta",
            "couple_lambda": True,
            "state_update_mode": self.update_mode,
            "rankwise_gates": True,
            "num_state_heads": self.heads,
            "target_layers": list(self.layers),
            "delta_heads": list(self.delta_heads),
        }
        if self.start == starts.ORIGINAL:
            said |= {"beta_bias_init": starts.BETA_BIAS, "output_init": "base_slice_fixed"}
            said |= {"base_slice_ref_width": starts.COLUMNS, "online_gain": starts.GAIN}
        if self.memory == DELTA_RULE:
            return said | {"normalize_qk": True}
        said |= {
            "memory_backend": RWKV_MS,
            "rwkv_ms_num_states": self.states,
            "rwkv_ms_chunk_size": self.chunk,
            "rwkv_ms_boundary_mode": "fixed_chunk",
            "rwkv_ms_erase_gate": 1.0,
        }
        return said if self.semantics == 1 else said | {"rwkv_ms_semantics_version": self.semantics}


def new_adapter(spec: AdapterSpec, model: nn.Module, seed: int) -> Adapter:
    """An adapter for a base, with the values that training starts from."""
    attention = attention_layers(model)
    if wrong := [layer for layer in spec.layers if layer not in attention]:
        raise LlamamemError(f"target layer {wrong[0]} is not one of the base's {len(attention)}; give other --layers")
    spec = replace(spec, layers=spec.layers or tuple(attention))
    hidden = hidden_width(attention[0])
    shape, heads, _ = rules(spec.config(), hidden, "the new adapter")
    generator = torch.Generator().manual_seed(seed)
    layers: dict[int, Layer] = {}
    for layer in spec.layers:
        widths = projection_widths(attention[layer])
        if missing := [head for head in heads if head not in widths]:
            raise LlamamemError(f"layer {layer} of the base has no {missing[0]} projection of its own")
        memory = _new_layer(spec, shape, widths, heads)
        if spec.start == starts.ORIGINAL:
            weights = {head: module.weight[rows] for head, (module, rows) in projections(attention[layer]).items()}
            starts.start_as_original(memory, weights, layer, len(attention), generator)
        elif isinstance(memory, Memory):
            start_memory(memory, generator)
        else:
            starts.start_delta(memory, generator)
        layers[layer] = memory
    nested = type(attention[0]).__name__.startswith("Gemma4")
    return Adapter(layers, shape, spec.config(), prefix=SOURCE_PREFIX if nested else "model.layers.")


def _new_layer(spec: AdapterSpec, shape: Shape, widths: Mapping[str, int], heads: tuple[str, ...]) -> Layer:
    if isinstance(shape, DeltaShape):
        return DeltaMemory(shape, widths, heads)
    return Memory(shape, widths, heads, lora=spec.lora)


def trained_values(adapter: Adapter) -> int:
    """How many values of an adapter have an effect."""
    return sum(
        parameter.numel()
        for memory in adapter.layers.values()
        for name, parameter in memory.named_parameters()
        if is_used(memory, name)
    )


def is_used(memory: Layer, name: str) -> bool:
    """Whether a parameter has an effect: checkpoints hold some of other backends, and deltas of heads not in use."""
    if name.startswith("delta_") and name.endswith("_proj"):
        return name in [f"delta_{head}_proj" for head in memory.delta_heads]
    return isinstance(memory, DeltaMemory) or name not in ("memory_q_proj", "memory_k_proj", "hrm_rwkv7_core.ln_x.bias")


def save_adapter(adapter: Adapter, folder: Path, metadata: Mapping[str, Any], *, force: bool = False) -> list[Path]:
    """Writes a checkpoint in the layout of its kind, in fp32: what is read back is exactly what was trained."""
    tensors = []
    for layer, memory in adapter.layers.items():
        for name, tensor in memory.state_dict().items():
            array = tensor.detach().to(torch.float32).cpu().contiguous().numpy()
            tensors.append(GgufTensor(f"{adapter.prefix}{layer}.self_attn.{name}", "F32", array.shape, array.tobytes()))
    if adapter.kind == DELTA_RULE:
        return write_checkpoint(folder, tensors, adapter.config, None, format="pt", force=force)
    about = {"memory_type": "delta-mem-rwkv-ms", "wrapped_layers": list(adapter.layers), **metadata}
    return write_checkpoint(folder, tensors, adapter.config, about, format="safetensors", force=force)
