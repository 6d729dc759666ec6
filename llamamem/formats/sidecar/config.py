"""Which checkpoint configurations are implemented: an allow-list of keys and of the values that change the maths.

The same lists stand in the runtime's loader [TAG_ADAPTER_MEM_CONFIG]: a key that neither knows is refused by both,
because it may change the maths. Each kind of memory has lists of its own.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from llamamem.errors import LlamamemError
from llamamem.formats.findings import quoted

UPDATE_MODES = ("standard", "lambda_outside", "no_lambda")

# read by the loader
_READ = {
    "rank", "alpha", "num_state_heads", "couple_lambda", "state_update_mode", "rankwise_gates", "target_layers",
    "delta_heads", "memory_backend", "memory_readout_mode",
}  # fmt: skip
READ = _READ | {
    "rwkv_ms_num_states", "rwkv_ms_chunk_size", "rwkv_ms_erase_gate", "rwkv_ms_boundary_mode",
    "rwkv_ms_semantics_version", "rwkv_ms_state_dtype",
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

# of a delta rule: a member that is not there has this value. Not one must be there, not even memory_backend.
DELTA_DEFAULTS: dict[str, Any] = {
    "rank": 8,
    "alpha": 16.0,
    "num_state_heads": 1,
    "couple_lambda": True,
    "state_update_mode": "standard",
    "rankwise_gates": True,
    "target_layers": [],
    "delta_heads": ["q", "k", "v", "o"],
    "memory_backend": "delta_rule",
    "memory_readout_mode": "delta",
    "normalize_qk": True,
    "delta_o_rmsnorm": False,
    "delta_o_rmsnorm_eps": 1e-6,
    "trainable_delta_scale": False,
    "delta_scale_max": 2.0,
    "delta_scale_granularity": "layer",
}

_DELTA_FIXED = {key: value for key, value in FIXED.items() if key not in (*DELTA_DEFAULTS, "delta_scale_init")} | {
    "global_memory_mode": "shared_rw",
    "global_memory_merge_mode": "gated_residual",
    "global_memory_read_logit_bias": 0.0,
    "memory_reader_hidden_size": 1024,
    "memory_reader_residual_scale": 0.1,
    "memory_reader_read_only": True,
    "memory_write_proposals_per_message": 2,
    "latent_memory_hidden_size": 1024,
    "latent_memory_residual_scale": 0.1,
    "latent_memory_slots": 4,
}

# also what a file for both kinds has of the other one
_DELTA_INERT: dict[type, set[str]] = {
    float: INERT[float] - _DELTA_FIXED.keys() - DELTA_DEFAULTS.keys() | {
        "delta_scale_init", "rwkv_ms_num_states", "rwkv_ms_chunk_size", "rwkv_ms_erase_gate",
        "rwkv_ms_semantics_version",
    },
    str: {"output_init", "rwkv_ms_boundary_mode", "rwkv_ms_state_dtype"},
    bool: INERT[bool],
}  # fmt: skip

# by kind: what is read, what has one value alone, what cannot change the maths
_LISTS: dict[str, tuple[Collection[str], Mapping[str, Any], Mapping[type, set[str]]]] = {
    "rwkv_ms": (READ, FIXED, INERT),
    "delta_rule": (DELTA_DEFAULTS.keys(), _DELTA_FIXED, _DELTA_INERT),
}

# what a member that is not there means
ABSENT: dict[str, dict[str, Any]] = {
    "rwkv_ms": FIXED | {"rwkv_ms_semantics_version": 1, "rwkv_ms_state_dtype": "f32"},
    "delta_rule": _DELTA_FIXED | DELTA_DEFAULTS,
}

_WHY = {
    ("memory_write_granularity", mode): (
        "writes once for a whole message or sentence, with the mean of its tokens, and a batch of the runtime does not "
        "say which tokens those are"
    )
    for mode in ("message_mean", "sentence_mean")
}

_F32_MAX = 3.4028234663852886e38  # the runtime computes in fp32; false for NaN too
_EXPECTED = {float: "a finite number", str: "a string", bool: "true or false"}


def config_faults(where: str, config: Mapping[str, Any], kind: str = "rwkv_ms") -> Iterator[LlamamemError]:
    """Each member that is unknown or not implemented for a kind of memory, in the order of their names' bytes."""
    read, fixed, inert_by_type = _LISTS[kind]
    inert = {key: type_ for type_, keys in inert_by_type.items() for key in keys}
    for key, value in sorted(config.items()):
        if key in fixed:
            want = fixed[key]
            if not _same(value, want):
                why = _WHY.get((key, value)) if isinstance(value, str) else None
                yield LlamamemError(
                    f"{where}: {key} is {_shown(value)}, but only {json.dumps(want)} is implemented"
                    + (
                        f": it {why}; use an adapter that writes token by token"
                        if why
                        else "; export a checkpoint without it"
                    ),
                    reason="config-unsupported",
                )
        elif key in inert:
            if not _is(inert[key], value):
                yield _impossible(where, key, value, _EXPECTED[inert[key]])
        elif key not in read:
            yield LlamamemError(
                f"{where}: unknown member {quoted(key)}: it may change the maths, so it needs a newer version",
                reason="config-unknown",
            )


def check_config(where: str, config: Mapping[str, Any], kind: str = "rwkv_ms") -> None:
    """Refuses a member that is unknown and a value that is not implemented."""
    for fault in config_faults(where, config, kind):
        raise fault


def kind_of(config: Mapping[str, Any]) -> str | None:
    """The kind of memory of a checkpoint's config: a delta rule's need not name it. None for one that is not known."""
    kind = config.get("memory_backend", "delta_rule")
    return kind if isinstance(kind, str) and kind in _LISTS else None


def with_defaults(config: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """A config with what absent members mean: nothing in an RWKV-MS, where all that is read must be there."""
    return (DELTA_DEFAULTS if kind == "delta_rule" else {}) | dict(config)


def integer(where: str, obj: Mapping[str, Any], key: str, low: int, high: int) -> int:
    """An integer of a JSON object, low <= value <= high."""
    value = _present(where, obj, key)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise _impossible(where, key, value, f"an integer from {low} to {high}")
    return value


def number(where: str, obj: Mapping[str, Any], key: str) -> float:
    """A finite number of a JSON object, within the range of f32."""
    value = _present(where, obj, key)
    if not _is(float, value):
        raise _impossible(where, key, value, _EXPECTED[float])
    return float(value)


def not_negative(where: str, obj: Mapping[str, Any], key: str) -> float:
    """A number of at least 0."""
    value = number(where, obj, key)
    if value < 0:
        raise _impossible(where, key, obj[key], "0 or more")
    return value


def boolean(where: str, obj: Mapping[str, Any], key: str) -> bool:
    """A truth value of a JSON object."""
    value = _present(where, obj, key)
    if not isinstance(value, bool):
        raise _impossible(where, key, value, _EXPECTED[bool])
    return value


def choice(where: str, obj: Mapping[str, Any], key: str, allowed: tuple[str, ...]) -> str:
    """One of a few strings of a JSON object."""
    value = _present(where, obj, key)
    if not isinstance(value, str):
        raise _impossible(where, key, value, _EXPECTED[str])
    if value not in allowed:
        raise LlamamemError(
            f"{where}: {key} is {_shown(value)}, but only {', '.join(allowed)} is implemented",
            reason="config-unsupported",
        )
    return value


def same(a: Any, b: Any) -> bool:
    """Whether two lists of a JSON text are equal, where a truth value is no number."""
    if not isinstance(a, list) or not isinstance(b, list) or len(a) != len(b):
        return False
    return all(isinstance(x, bool) == isinstance(y, bool) and x == y for x, y in zip(a, b, strict=True))


def _present(where: str, obj: Mapping[str, Any], key: str) -> Any:
    if key not in obj:
        raise LlamamemError(f"{where}: {key} is missing", reason="config-missing")
    return obj[key]


def _impossible(where: str, key: str, value: Any, want: str) -> LlamamemError:
    return LlamamemError(f"{where}: {key} is {_shown(value)}, must be {want}", reason="config-value")


def _shown(value: Any) -> str:
    """Untrusted JSON for a message: ASCII, at most 80 characters."""
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _is(kind: type, value: Any) -> bool:
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _F32_MAX
    return isinstance(value, kind)


def _same(value: Any, want: Any) -> bool:
    if isinstance(want, float):
        return _is(float, value) and bool(value == want)
    return type(value) is type(want) and bool(value == want)
