"""The memory layers of an adapter, as PyTorch modules: read from a checkpoint directory or from a sidecar."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llamamem.errors import LlamamemError
from llamamem.formats.checkpoint import read_checkpoint
from llamamem.formats.checkpoint.writer import checkpoint_tensors
from llamamem.formats.gguf_file import GgufTensor
from llamamem.formats.sidecar import HEADS, Sidecar, read_sidecar, short_name, values
from llamamem.formats.sidecar import config as cfg
from llamamem.formats.sidecar.layout import DELTA_RULE, RWKV_MS, SOURCE_PREFIX, source_prefix
from llamamem.formats.state import Identity, identity_of
from llamamem.reference import torch_delta, torch_memory
from llamamem.reference.delta_oracle import DeltaShape
from llamamem.reference.oracle import MemoryShape
from llamamem.reference.torch_delta import DeltaMemory
from llamamem.reference.torch_memory import Memory

Layer = Memory | DeltaMemory
Shape = MemoryShape | DeltaShape

_MODES = {"memory_backend": RWKV_MS, "memory_readout_mode": "delta", "rwkv_ms_boundary_mode": "fixed_chunk"}
_SEMANTICS = "rwkv_ms_semantics_version"

Weights = dict[int, dict[str, np.ndarray]]


@dataclass(frozen=True)
class Adapter:
    """Memory layers by base layer. `identity` is what its saved memories belong to; only a sidecar has one."""

    layers: dict[int, Layer]
    shape: Shape
    config: dict[str, Any]
    identity: Identity | None = None
    prefix: str = SOURCE_PREFIX  # of its tensors' names in a checkpoint, before the number of a layer

    @property
    def kind(self) -> str:
        """rwkv_ms or delta_rule."""
        return DELTA_RULE if isinstance(self.shape, DeltaShape) else RWKV_MS


def read_adapter(path: str | Path, config: str | None = None) -> Adapter:
    """Reads a checkpoint directory, or a sidecar GGUF. `config` is another config file of a directory.

    Raises LlamamemError for what the runtime would refuse, naming the file and the member or tensor.
    """
    if not Path(path).is_dir():
        if config is not None:
            raise LlamamemError(f"{path}: a sidecar has its config in it; only a checkpoint directory takes another")
        return adapter_of(read_sidecar(path))
    source = read_checkpoint(path, config)
    prefix, named = _by_layer(source.tensors.values(), str(source.adapter))
    hidden = next((w["mem_v"].shape[-1] for w in named.values() if "mem_v" in w), 0)
    shape, heads, targets = rules(source.config, hidden, str(source.config_path))
    layers = _layers(named, targets, shape, heads, str(source.adapter))
    return Adapter(layers, shape, source.config, prefix=prefix)


def adapter_of(sidecar: Sidecar) -> Adapter:
    """The layers of a sidecar that was read before. Hashes its file."""
    prefix, named = _by_layer(checkpoint_tensors(sidecar).values(), str(sidecar.path))
    shape, heads, _ = rules(sidecar.config, sidecar.hidden, str(sidecar.path))
    layers = _layers(named, [layer.layer for layer in sidecar.layers], shape, heads, str(sidecar.path))
    return Adapter(layers, shape, sidecar.config, identity_of(sidecar), prefix)


def rules(config: Mapping[str, Any], hidden: int, where: str) -> tuple[Shape, tuple[str, ...], list[int]]:
    """Shape, delta heads and target layers (none: all) of a config.

    Raises LlamamemError for what is not implemented.
    """
    kind = cfg.kind_of(config)
    cfg.check_config(where, config, kind or RWKV_MS)
    config = cfg.with_defaults(config, kind or RWKV_MS)
    if kind == DELTA_RULE:
        return _delta_rules(config, hidden, where)
    for key, mode in _MODES.items():
        cfg.choice(where, config, key, (mode,))
    heads, targets = _heads_and_targets(config, where)
    if not targets:
        raise LlamamemError(f"{where}: target_layers must be a list of layer numbers")
    shape = MemoryShape(
        hidden=hidden,
        rank=cfg.integer(where, config, "rank", 1, 256),
        heads=cfg.integer(where, config, "num_state_heads", 1, 64),
        states=cfg.integer(where, config, "rwkv_ms_num_states", 1, 1024),
        chunk=cfg.integer(where, config, "rwkv_ms_chunk_size", 1, 1 << 24),
        semantics=cfg.integer(where, {_SEMANTICS: 1, **config}, _SEMANTICS, 1, 2),
        alpha=float(np.float32(cfg.number(where, config, "alpha"))),
        erase_gate=cfg.number(where, config, "rwkv_ms_erase_gate"),
        update_mode=cfg.choice(where, config, "state_update_mode", cfg.UPDATE_MODES),
        couple_lambda=cfg.boolean(where, config, "couple_lambda"),
    )
    return shape, heads, targets


def _delta_rules(config: Mapping[str, Any], hidden: int, where: str) -> tuple[Shape, tuple[str, ...], list[int]]:
    shape = DeltaShape(
        hidden=hidden,
        rank=cfg.integer(where, config, "rank", 1, 256),
        heads=cfg.integer(where, config, "num_state_heads", 1, 64),
        alpha=float(np.float32(cfg.number(where, config, "alpha"))),
        update_mode=cfg.choice(where, config, "state_update_mode", cfg.UPDATE_MODES),
        couple_lambda=cfg.boolean(where, config, "couple_lambda"),
        normalize_qk=cfg.boolean(where, config, "normalize_qk"),
        scale_max=float(np.float32(cfg.number(where, config, "delta_scale_max"))),
        o_rmsnorm_eps=float(np.float32(cfg.number(where, config, "delta_o_rmsnorm_eps"))),
    )
    return shape, *_heads_and_targets(config, where)


def _heads_and_targets(config: Mapping[str, Any], where: str) -> tuple[tuple[str, ...], list[int]]:
    heads, targets = config.get("delta_heads"), config.get("target_layers")
    if not isinstance(heads, list) or not heads or any(head not in HEADS for head in heads):
        raise LlamamemError(f"{where}: delta_heads must be a list of some of {', '.join(HEADS)}")
    if not isinstance(targets, list) or any(type(layer) is not int for layer in targets):
        raise LlamamemError(f"{where}: target_layers must be a list of layer numbers")
    return tuple(heads), targets


def _layers(
    named: Weights, targets: Iterable[int], shape: Shape, heads: tuple[str, ...], where: str
) -> dict[int, Layer]:
    """The modules of the target layers; of all that have tensors where none is named."""
    try:
        return {layer: _module(named.get(layer, {}), shape, heads) for layer in targets or sorted(named)}
    except (KeyError, RuntimeError, AttributeError) as e:
        raise LlamamemError(f"{where}: a tensor is missing, or of another shape than the config says: {e}") from e


def _module(weights: Mapping[str, np.ndarray], shape: Shape, heads: tuple[str, ...]) -> Layer:
    if isinstance(shape, DeltaShape):
        return torch_delta.from_weights(weights, shape, heads)
    return torch_memory.from_weights(weights, shape, heads)


def _by_layer(tensors: Iterable[GgufTensor], where: str) -> tuple[str, Weights]:
    """What all names begin with, and the tensors of each layer by their names in a sidecar."""
    tensors = list(tensors)
    prefix = source_prefix(tensor.name for tensor in tensors)
    if prefix is None:
        raise LlamamemError(f"{where}: no tensor is named as one of a layer's self_attn")
    found: Weights = {}
    for tensor in tensors:
        blk, layer, short = [*short_name(tensor.name, True, prefix).split(".", 2), ""][:3]
        if blk != "blk":
            raise LlamamemError(f"{where}: tensor '{tensor.name}' is of no layer's self_attn")
        found.setdefault(int(layer), {})[short] = values(tensor)
    return prefix, found
