"""What a sidecar holds: its keys, the names of its tensors, and the values that a valid one stands for.

Tensors are named `blk.{layer}.{short}`; shapes are torch's. docs/sidecar.md has it by byte.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFValueType

from llamamem.formats.base import AttentionLayer
from llamamem.formats.gguf_file import GgufField, GgufTensor

ARCHITECTURE = "rwkv_ms_memory"
SCHEMA = "delta_mem_rwkv_ms_memory_gguf_sidecar"
NAME_FORMAT = "compact_with_source_name_manifest"
PREFIX = "delta_mem."
HEADS = ("q", "k", "v", "o")
VECTORS = ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "w0", "a0", "k_k", "k_a", "ln_x.weight", "ln_x.bias")

# keys of the file, without the prefix, and their types; those for people may be absent
FOR_PEOPLE = (
    *("status", "memory_type", "base_model", "checkpoint_repo", "base_gguf", "mmproj_gguf", "mmproj_gguf_sha256"),
    *("adapter_metadata_json", "required_runtime_hooks_json"),
)
_STRINGS = (
    *FOR_PEOPLE,
    *("schema", "memory_backend", "memory_readout_mode", "base_gguf_sha256", "tensor_name_format"),
    *("rwkv_ms_boundary_mode", "rwkv_ms_state_dtype", "target_layers_json", "delta_heads_json"),
    *("per_layer_attention_json", "config_json", "tensor_manifest_json"),
)
_U32 = (
    *("format_version", "rwkv_ms_semantics_version", "tensor_count", "rank", "num_state_heads", "rwkv_ms_num_states"),
    "rwkv_ms_chunk_size",
)
TYPES = (
    dict.fromkeys(_STRINGS, GGUFValueType.STRING)
    | dict.fromkeys(_U32, GGUFValueType.UINT32)
    | dict.fromkeys(("total_numel", "total_bytes"), GGUFValueType.UINT64)
    | {"alpha": GGUFValueType.FLOAT32}
)

_SHORT = {
    "memory_q_proj": "mem_q",
    "memory_k_proj": "mem_k",
    "memory_v_proj": "mem_v",
    "beta_proj": "beta",
    "beta_bias": "beta_b",
    "lambda_proj": "lambda",
    "lambda_bias": "lambda_b",
} | {f"delta_{head}_proj": f"delta_{head}" for head in HEADS}
_SOURCE = re.compile(r"model\.language_model\.layers\.(0|[1-9][0-9]{0,4})\.self_attn\.(.+)")


@dataclass(frozen=True)
class Sidecar:
    """A valid sidecar. `fields` and `tensors` are the file's own, in its order."""

    path: Path
    format_version: int
    semantics: int
    rank: int
    heads: int  # N, state heads
    states: int  # M, states a head
    chunk: int  # C, tokens
    alpha: float
    erase_gate: float
    update_mode: str
    couple_lambda: bool
    hidden: int
    delta_heads: tuple[str, ...]
    layers: tuple[AttentionLayer, ...]
    base_sha256: str
    config: dict[str, Any]
    fields: dict[str, GgufField]
    tensors: dict[str, GgufTensor]

    def weights(self, layer: int) -> dict[str, np.ndarray]:
        """The tensors of one base layer by short name, up-converted to fp32."""
        prefix = f"blk.{layer}."
        return {name.removeprefix(prefix): values(t) for name, t in self.tensors.items() if name.startswith(prefix)}


def short_name(source: str) -> str:
    """A tensor's name in the file, of its name in the checkpoint."""
    match = _SOURCE.fullmatch(source)
    if match:
        layer, tail = match.groups()
        if tail in _SHORT:
            return f"blk.{layer}.{_SHORT[tail]}"
        if tail.startswith("hrm_rwkv7_core."):
            return f"blk.{layer}.rwkv.{tail.removeprefix('hrm_rwkv7_core.')}"
    return f"tensor.{hashlib.sha1(source.encode()).hexdigest()[:16]}"


def values(tensor: GgufTensor) -> np.ndarray:
    """A tensor as fp32, in its torch shape."""
    if tensor.dtype == "BF16":
        raw = np.frombuffer(tensor.data, "<u2").astype("<u4") << 16
        return raw.view("<f4").reshape(tensor.shape)
    return np.frombuffer(tensor.data, {"F16": "<f2", "F32": "<f4"}[tensor.dtype]).astype("<f4").reshape(tensor.shape)


def manifest_entry(tensor: GgufTensor, source: str) -> dict[str, Any]:
    """What the manifest says of a tensor."""
    torch_dtype = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}[tensor.dtype]
    return {
        "name": tensor.name,
        "source_name": source,
        "shape": list(tensor.shape),
        "torch_dtype": torch_dtype,
        "gguf_type": tensor.dtype,
        "numel": prod(tensor.shape),
        "bytes": len(tensor.data),
        "sha256_raw": hashlib.sha256(tensor.data).hexdigest(),
    }
