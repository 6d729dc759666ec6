"""What a sidecar holds: its keys, the names of its tensors, and the values that a valid one stands for.

Tensors are named `blk.{layer}.{short}`; shapes are torch's. docs/sidecar.md has it by byte.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFValueType

from llamamem.formats.base import AttentionLayer
from llamamem.formats.gguf_file import GgufField, GgufTensor

NAME_FORMAT = "compact_with_source_name_manifest"
HEADS = ("q", "k", "v", "o")
RWKV_MS, DELTA_RULE = "rwkv_ms", "delta_rule"
MEMORY_KINDS = (RWKV_MS, DELTA_RULE)
DELTA_CHUNK = 1 << 24  # what the token counter of a delta rule's state wraps at; it is for display
HF_ROWS, NORM_ROWS = "hf", "norm"  # of delta_q and delta_k: the checkpoint's, or permuted for a rope over neighbours
VECTORS = ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "w0", "a0", "k_k", "k_a", "ln_x.weight", "ln_x.bias")

# versions 1 and 2
ARCHITECTURE = "rwkv_ms_memory"
SCHEMA = "delta_mem_rwkv_ms_memory_gguf_sidecar"
PREFIX = "delta_mem."
SOURCE_PREFIX = "model.language_model.layers."

# version 3
ARCHITECTURE_3 = "memory_adapter"
SCHEMA_3 = "memory_adapter_gguf_sidecar"
PREFIX_3 = "memory_adapter."
SOURCE_PREFIXES = ("model.layers.", SOURCE_PREFIX)

ARCHITECTURES = (ARCHITECTURE, ARCHITECTURE_3)

# keys of the file, without the prefix, and their types; those for people may be absent
FOR_PEOPLE = (
    *("status", "memory_type", "base_model", "checkpoint_repo", "base_gguf", "mmproj_gguf", "mmproj_gguf_sha256"),
    *("adapter_metadata_json", "required_runtime_hooks_json"),
)
FOR_PEOPLE_3 = (*FOR_PEOPLE, "omitted_tensors_json")
_STRINGS = (
    *("schema", "memory_readout_mode", "base_gguf_sha256", "tensor_name_format", "target_layers_json"),
    *("delta_heads_json", "per_layer_attention_json", "config_json", "tensor_manifest_json"),
)
_NUMBERS = dict.fromkeys(
    ("format_version", "tensor_count", "rank", "num_state_heads"), GGUFValueType.UINT32
) | dict.fromkeys(("total_numel", "total_bytes"), GGUFValueType.UINT64)
_COMMON = dict.fromkeys(_STRINGS, GGUFValueType.STRING) | _NUMBERS | {"alpha": GGUFValueType.FLOAT32}
_OF_RWKV_MS = dict.fromkeys(("rwkv_ms_boundary_mode", "rwkv_ms_state_dtype"), GGUFValueType.STRING) | dict.fromkeys(
    ("rwkv_ms_semantics_version", "rwkv_ms_num_states", "rwkv_ms_chunk_size"), GGUFValueType.UINT32
)
TYPES = dict.fromkeys((*FOR_PEOPLE, "memory_backend"), GGUFValueType.STRING) | _COMMON | _OF_RWKV_MS
_COMMON_3 = (
    dict.fromkeys((*FOR_PEOPLE_3, "kind", "base_architecture", "source_prefix", "qk_row_order"), GGUFValueType.STRING)
    | _COMMON
    | {"rope_head_dim": GGUFValueType.UINT32}
)
TYPES_3 = {RWKV_MS: _COMMON_3 | _OF_RWKV_MS, DELTA_RULE: _COMMON_3}

_SHORT = {
    "memory_q_proj": "mem_q",
    "memory_k_proj": "mem_k",
    "memory_v_proj": "mem_v",
    "beta_proj": "beta",
    "beta_bias": "beta_b",
    "lambda_proj": "lambda",
    "lambda_bias": "lambda_b",
} | {f"delta_{head}_proj": f"delta_{head}" for head in HEADS}
_SHORT_3 = _SHORT | {"delta_scale_raw": "delta_scale", "delta_o_rmsnorm_weight": "delta_o_norm"}
_SOURCE = re.compile(r"(model\.(?:language_model\.)?layers\.)(0|[1-9][0-9]{0,4})\.self_attn\.(.+)")


@dataclass(frozen=True)
class Sidecar:
    """A valid sidecar. `fields` and `tensors` are the file's own, in its order.

    A delta rule has one state a head and no semantics, chunk or erase gate: 1, 0, DELTA_CHUNK and 1.
    """

    path: Path
    format_version: int
    kind: str  # of MEMORY_KINDS
    base_arch: str  # llama.cpp's name
    source_prefix: str
    row_order: str  # HF_ROWS or NORM_ROWS
    rope_head_dim: int  # width of a head whose rows are permuted, 0 with HF_ROWS
    semantics: int
    rank: int
    heads: int  # N, state heads
    states: int  # M, states a head
    chunk: int  # C, tokens
    alpha: float
    erase_gate: float
    update_mode: str
    couple_lambda: bool
    normalize_qk: bool
    o_norm_eps: float | None  # of the RMS norm over the delta of o; None: there is none
    scale_max: float | None  # m_X = scale_max * sigmoid(delta_scale); None: m_X = 1
    hidden: int
    delta_heads: tuple[str, ...]
    layers: tuple[AttentionLayer, ...]
    base_sha256: str
    config: dict[str, Any]
    fields: dict[str, GgufField]
    tensors: dict[str, GgufTensor]

    @property
    def prefix(self) -> str:
        """What all keys but `general.*` begin with."""
        return PREFIX_3 if self.format_version == 3 else PREFIX

    def get(self, key: str) -> Any:
        """The value of a key, given without the prefix; None if it is not there."""
        field = self.fields.get(self.prefix + key)
        return None if field is None else field.value

    def weights(self, layer: int) -> dict[str, np.ndarray]:
        """The tensors of one base layer by short name, up-converted to fp32."""
        prefix = f"blk.{layer}."
        return {name.removeprefix(prefix): values(t) for name, t in self.tensors.items() if name.startswith(prefix)}


def short_name(source: str, is_3: bool = False, prefix: str = SOURCE_PREFIX) -> str:
    """A tensor's name in a file, of its name in the checkpoint; `is_3` for version 3 of the format."""
    match = _SOURCE.fullmatch(source)
    if match and match[1] == prefix:
        _, layer, tail = match.groups()
        known = _SHORT_3 if is_3 else _SHORT
        if tail in known:
            return f"blk.{layer}.{known[tail]}"
        if tail.startswith("hrm_rwkv7_core."):
            return f"blk.{layer}.rwkv.{tail.removeprefix('hrm_rwkv7_core.')}"
    return f"tensor.{hashlib.sha1(source.encode()).hexdigest()[:16]}"


def source_prefix(sources: Iterable[str]) -> str | None:
    """The prefix of a checkpoint's names, of the first that has one."""
    return next((match[1] for name in sources if (match := _SOURCE.fullmatch(name))), None)


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
