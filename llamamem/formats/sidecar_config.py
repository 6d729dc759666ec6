"""Which checkpoint configurations are implemented: an allow-list of keys and of the values that change the maths.

The same lists stand in the runtime's loader [TAG_RWKV_MS_CONFIG]: a key that neither knows is refused by both, because
it may change the maths.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from llamamem.errors import LlamamemError

UPDATE_MODES = ("standard", "lambda_outside", "no_lambda")

# read by the loader
READ = {
    "rank", "alpha", "num_state_heads", "rwkv_ms_num_states", "rwkv_ms_chunk_size", "rwkv_ms_erase_gate",
    "couple_lambda", "state_update_mode", "rankwise_gates", "target_layers", "delta_heads", "memory_backend",
    "memory_readout_mode", "rwkv_ms_boundary_mode", "rwkv_ms_semantics_version", "rwkv_ms_state_dtype",
}  # fmt: skip

# can change the maths: only the implemented value, which is also what an absent key means
FIXED: dict[str, Any] = {
    "memory_write_source": "learned_hidden",
    "memory_write_granularity": "token",
    "memory_fusion_mode": "add",
    "memory_fusion_placement": "attention_output",
    "memory_fusion_residual_scale": 1.0,
    "memory_fusion_residual_scale_max": 1.0,
    "target_modules": ["self_attn"],
    "delta_o_rmsnorm": False,
    "trainable_delta_scale": False,
    "delta_scale_init": 1.0,
    "delta_scale_parameterization": "alpha_over_rank",
    "normalize_qk": True,
    "rwkv_ms_write_mode": "recurrent",
    "rwkv_ms_read_temperature": 1.0,
    "rwkv_ms_read_top_k": 0,
    "rwkv_ms_mask_empty_slots": False,
    "rwkv_ms_hybrid_mode": "residual",
    "rwkv_ms_write_address_gain": 0.0,
    "rwkv_ms_anchor_interval": 0,
    "rwkv_ms_anchor_capacity": 0,
    "rwkv_ms_anchor_top_k": 0,
    "rwkv_ms_outer_ffn_layers": [],
    "num_memory_partitions": 1,
    "num_global_memory_partitions": 0,
    "memory_partition_routing": "soft",
    "memory_partition_basis": "shared",
    "memory_partition_read_mode": "softmax",
    "tie_memory_partition_read_write": False,
    "slot_read_top_k": 0,
    "global_memory_read_top_k": 0,
    "synthetic_memory_slots": 1,
    "memory_reader_layers": [],
    "latent_memory_layers": [],
}

# cannot change the maths: values at the start of training, options of training, figures of features that are off
INERT: dict[type, set[str]] = {
    float: {
        "beta_bias_init", "base_slice_ref_width", "online_gain", "memory_partition_sigmoid_gate_bias_init",
        "global_memory_gate_bias_init", "global_memory_read_logit_bias", "memory_reader_hidden_size",
        "memory_reader_residual_scale", "projected_kv_key_dim", "projected_kv_temperature",
        "projected_kv_update_cosine_threshold", "memory_write_proposals_per_message", "latent_memory_hidden_size",
        "latent_memory_residual_scale", "latent_memory_slots", "latent_memory_init_std", "latent_gate_init",
        "delta_o_rmsnorm_eps", "memory_fusion_gate_init", "delta_scale_max", "rwkv_ms_output_init_scale",
        "rwkv_ms_anchor_route_dim", "rwkv_ms_anchor_residual_scale", "rwkv_ms_anchor_null_bias_init",
        "rwkv_ms_hybrid_gain", "rwkv_ms_outer_ffn_gain",
    },
    str: {"output_init", "global_memory_mode", "global_memory_merge_mode", "delta_scale_granularity"},
    bool: {"memory_reader_read_only", "rwkv_ms_detach_read_scores"},
}  # fmt: skip

_F32_MAX = 3.4028234663852886e38  # the runtime computes in fp32; false for NaN too
_EXPECTED = {float: "a finite number", str: "a string", bool: "true or false"}


def parse_json(where: str, text: str) -> Any:
    """JSON with no duplicate keys and no NaN. `where` names the text in errors."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise LlamamemError(f"{where}: key '{twice}' is there twice")
        return result

    def refuse(constant: str) -> None:
        raise LlamamemError(f"{where}: {constant} is not JSON")

    try:
        return json.loads(text, object_pairs_hook=once, parse_constant=refuse)
    except (ValueError, RecursionError):
        raise LlamamemError(f"{where}: not valid JSON") from None


def check_config(where: str, config: Mapping[str, Any]) -> None:
    """Refuses a key that is unknown and a value that is not implemented."""
    inert = {key: kind for kind, keys in INERT.items() for key in keys}
    for key, value in config.items():
        if key in FIXED:
            want = FIXED[key]
            if not _same(value, want):
                raise LlamamemError(
                    f"{where}: {key} is {json.dumps(value)}, but only {json.dumps(want)} is implemented; "
                    "export a checkpoint without it"
                )
        elif key in inert:
            if not _is(inert[key], value):
                raise LlamamemError(f"{where}: {key} is {json.dumps(value)}, must be {_EXPECTED[inert[key]]}")
        elif key not in READ:
            raise LlamamemError(f"{where}: unknown key '{key}': it may change the maths, so this version refuses it")


def integer(where: str, obj: Mapping[str, Any], key: str, low: int, high: int) -> int:
    """An integer of a JSON object, low <= value <= high."""
    value = _present(where, obj, key)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise LlamamemError(f"{where}: {key} is {json.dumps(value)}, must be an integer from {low} to {high}")
    return value


def number(where: str, obj: Mapping[str, Any], key: str) -> float:
    """A finite number of a JSON object."""
    value = _present(where, obj, key)
    if not _is(float, value):
        raise LlamamemError(f"{where}: {key} is {json.dumps(value)}, must be {_EXPECTED[float]}")
    return float(value)


def boolean(where: str, obj: Mapping[str, Any], key: str) -> bool:
    """A truth value of a JSON object."""
    value = _present(where, obj, key)
    if not isinstance(value, bool):
        raise LlamamemError(f"{where}: {key} is {json.dumps(value)}, must be {_EXPECTED[bool]}")
    return value


def choice(where: str, obj: Mapping[str, Any], key: str, allowed: tuple[str, ...]) -> str:
    """One of a few strings of a JSON object."""
    value = _present(where, obj, key)
    if value not in allowed or not isinstance(value, str):
        raise LlamamemError(f"{where}: {key} is {json.dumps(value)}, but only {', '.join(allowed)} is implemented")
    return value


def _present(where: str, obj: Mapping[str, Any], key: str) -> Any:
    if key not in obj:
        raise LlamamemError(f"{where}: key '{key}' is missing")
    return obj[key]


def _is(kind: type, value: Any) -> bool:
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _F32_MAX
    return isinstance(value, kind)


def _same(value: Any, want: Any) -> bool:
    if isinstance(want, float):
        return _is(float, value) and bool(value == want)
    return type(value) is type(want) and bool(value == want)
