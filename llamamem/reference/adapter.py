"""The memory layers of an adapter, as PyTorch modules: read from a checkpoint directory or from a sidecar."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llamamem.errors import LlamamemError
from llamamem.formats.checkpoint import Checkpoint, read_checkpoint
from llamamem.formats.sidecar import HEADS, Sidecar, read_sidecar, short_name, values
from llamamem.formats.sidecar import config as cfg
from llamamem.formats.state import Identity, identity_of
from llamamem.reference import torch_delta, torch_memory
from llamamem.reference.delta_oracle import DeltaShape
from llamamem.reference.oracle import MemoryShape
from llamamem.reference.torch_delta import DeltaMemory
from llamamem.reference.torch_memory import Memory

RWKV_MS, DELTA_RULE = KINDS = ("rwkv_ms", "delta_rule")

# what stands before the number of a layer: of Gemma 4's text model inside of its multimodal one, and of all others
NESTED, PLAIN = "model.language_model.layers.", "model.layers."

Layer = Memory | DeltaMemory
Shape = MemoryShape | DeltaShape

_MODES = {"memory_backend": RWKV_MS, "memory_readout_mode": "delta", "rwkv_ms_boundary_mode": "fixed_chunk"}
_SEMANTICS = "rwkv_ms_semantics_version"
_SOURCE = re.compile(r"(model\.(?:language_model\.)?layers\.)(0|[1-9][0-9]{0,4})\.self_attn\.(.+)")

# what an absent key of a delta-rule config means
_DELTA_DEFAULTS: dict[str, Any] = {
    "rank": 8,
    "alpha": 16.0,
    "num_state_heads": 1,
    "state_update_mode": "standard",
    "couple_lambda": True,
    "normalize_qk": True,
    "target_layers": [],
    "delta_heads": list(HEADS),
    "delta_o_rmsnorm": False,
    "delta_o_rmsnorm_eps": 1e-6,
    "trainable_delta_scale": False,
    "delta_scale_max": 2.0,
    "delta_scale_granularity": "layer",
    "memory_write_granularity": "token",
    "memory_write_source": "learned_hidden",
    "memory_readout_mode": "delta",
}


@dataclass(frozen=True)
class Adapter:
    """Memory layers by base layer. `identity` is what its saved memories belong to; only a sidecar has one."""

    layers: dict[int, Layer]
    shape: Shape
    config: dict[str, Any]
    identity: Identity | None = None
    prefix: str = NESTED  # of its tensors' names in a checkpoint

    @property
    def kind(self) -> str:
        """One of KINDS."""
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
    named, prefix = _by_layer(source)
    hidden = next((w["mem_v"].shape[-1] for w in named.values() if "mem_v" in w), 0)
    shape, heads, targets = rules(source.config, hidden, str(source.config_path))
    try:
        layers = {layer: _module(named.get(layer, {}), shape, heads) for layer in targets or sorted(named)}
    except (KeyError, RuntimeError, AttributeError) as e:
        raise LlamamemError(
            f"{source.adapter}: a tensor is missing, or of another shape than the config says: {e}"
        ) from e
    return Adapter(layers, shape, source.config, prefix=prefix)


def adapter_of(sidecar: Sidecar) -> Adapter:
    """The layers of a sidecar that was read before. Hashes its file."""
    shape = MemoryShape(
        hidden=sidecar.hidden,
        rank=sidecar.rank,
        heads=sidecar.heads,
        states=sidecar.states,
        chunk=sidecar.chunk,
        semantics=sidecar.semantics,
        alpha=sidecar.alpha,
        erase_gate=sidecar.erase_gate,
        update_mode=sidecar.update_mode,
        couple_lambda=sidecar.couple_lambda,
    )
    layers = {
        layer.layer: _module(sidecar.weights(layer.layer), shape, sidecar.delta_heads) for layer in sidecar.layers
    }
    return Adapter(layers, shape, sidecar.config, identity_of(sidecar))


def rules(config: Mapping[str, Any], hidden: int, where: str) -> tuple[Shape, tuple[str, ...], list[int]]:
    """Shape, delta heads and target layers (none: all) of a config.

    Raises LlamamemError for what is not implemented.
    """
    if config.get("memory_backend", DELTA_RULE) == DELTA_RULE:
        return _delta_rules({**_DELTA_DEFAULTS, **config}, hidden, where)
    cfg.check_config(where, config)
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
    for key in ("memory_write_granularity", "memory_write_source", "memory_readout_mode"):
        cfg.choice(where, config, key, (_DELTA_DEFAULTS[key],))
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


def _module(weights: Mapping[str, np.ndarray], shape: Shape, heads: tuple[str, ...]) -> Layer:
    if isinstance(shape, DeltaShape):
        return torch_delta.from_weights(weights, shape, heads)
    return torch_memory.from_weights(weights, shape, heads)


def _by_layer(source: Checkpoint) -> tuple[dict[int, dict[str, np.ndarray]], str]:
    """The tensors of each layer by their names in a sidecar, and what all their names begin with."""
    found: dict[int, dict[str, np.ndarray]] = {}
    prefix = NESTED
    for name, tensor in source.tensors.items():
        match = _SOURCE.fullmatch(name)
        if match is None:
            raise LlamamemError(f"{source.adapter}: tensor '{name}' is of no layer's self_attn")
        prefix, layer, tail = match.groups()
        short = torch_delta.SHORT.get(tail) or short_name(f"{NESTED}{layer}.self_attn.{tail}").split(".", 2)[-1]
        found.setdefault(int(layer), {})[short] = values(tensor)
    return found, prefix
