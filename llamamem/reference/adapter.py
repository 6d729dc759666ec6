"""The memory layers of an adapter, as PyTorch modules: read from a checkpoint directory or from a sidecar."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llamamem.errors import LlamamemError
from llamamem.formats.checkpoint import read_checkpoint
from llamamem.formats.sidecar import Sidecar, read_sidecar
from llamamem.formats.sidecar import config as cfg
from llamamem.formats.sidecar.layout import HEADS, short_name, values
from llamamem.formats.state import Identity, identity_of
from llamamem.reference.oracle import MemoryShape
from llamamem.reference.torch_memory import Memory, from_weights

_MODES = {"memory_backend": "rwkv_ms", "memory_readout_mode": "delta", "rwkv_ms_boundary_mode": "fixed_chunk"}
_SEMANTICS = "rwkv_ms_semantics_version"


@dataclass(frozen=True)
class Adapter:
    """Memory layers by base layer. `identity` is what its saved memories belong to; only a sidecar has one."""

    layers: dict[int, Memory]
    shape: MemoryShape
    config: dict[str, Any]
    identity: Identity | None = None


def read_adapter(path: str | Path, config: str | None = None) -> Adapter:
    """Reads a checkpoint directory, or a sidecar GGUF. `config` is another config file of a directory.

    Raises LlamamemError for what the runtime would refuse, naming the file and the member or tensor.
    """
    if not Path(path).is_dir():
        if config is not None:
            raise LlamamemError(f"{path}: a sidecar has its config in it; only a checkpoint directory takes another")
        return adapter_of(read_sidecar(path))
    source = read_checkpoint(path, config)
    named = {short_name(name): values(tensor) for name, tensor in source.tensors.items()}
    hidden = next((array.shape[-1] for name, array in named.items() if name.endswith(".mem_v")), 0)
    shape, heads, targets = rules(source.config, hidden, str(source.config_path))
    try:
        layers = {layer: from_weights(_own(named, layer), shape, heads) for layer in targets}
    except (KeyError, RuntimeError, AttributeError) as e:
        raise LlamamemError(
            f"{source.adapter}: a tensor is missing, or of another shape than the config says: {e}"
        ) from e
    return Adapter(layers, shape, source.config)


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
        layer.layer: from_weights(sidecar.weights(layer.layer), shape, sidecar.delta_heads) for layer in sidecar.layers
    }
    return Adapter(layers, shape, sidecar.config, identity_of(sidecar))


def rules(config: Mapping[str, Any], hidden: int, where: str) -> tuple[MemoryShape, tuple[str, ...], list[int]]:
    """Shape, delta heads and target layers of a config. Raises LlamamemError for what is not implemented."""
    cfg.check_config(where, config)
    for key, mode in _MODES.items():
        cfg.choice(where, config, key, (mode,))
    heads, targets = config.get("delta_heads"), config.get("target_layers")
    if not isinstance(heads, list) or not heads or any(head not in HEADS for head in heads):
        raise LlamamemError(f"{where}: delta_heads must be a list of some of {', '.join(HEADS)}")
    if not isinstance(targets, list) or not targets or any(type(layer) is not int for layer in targets):
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
    return shape, tuple(heads), targets


def _own(named: Mapping[str, np.ndarray], layer: int) -> dict[str, np.ndarray]:
    prefix = f"blk.{layer}."
    return {name.removeprefix(prefix): array for name, array in named.items() if name.startswith(prefix)}
