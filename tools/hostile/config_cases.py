"""Faults of config_json's members: those that are fixed, those that say nothing to the maths, those that are read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hostile.case import Case, both, early, member
from hostile.raw import Sidecar

# with the one value that is implemented, and others: each changes the maths, or is that value in another type
FIXED: dict[str, list[Any]] = {
    "memory_write_source": ["attention_input", 1],
    "memory_write_granularity": ["message"],
    "memory_fusion_mode": ["gated", ["add"]],
    "memory_fusion_placement": ["layer_output"],
    "memory_fusion_residual_scale": [0.5, True, "1.0"],
    "memory_fusion_residual_scale_max": [2.0],
    "target_modules": [["self_attn", "mlp"], [], "self_attn", None],
    "delta_o_rmsnorm": [True, 0],
    "trainable_delta_scale": [True, None],
    "delta_scale_init": [1.0000001],
    "delta_scale_parameterization": ["sigmoid"],
    "normalize_qk": [False, 1],
    "rwkv_ms_write_mode": ["parallel", "recurrent\0"],
    "rwkv_ms_read_temperature": [0.5, 1e300],
    "rwkv_ms_read_top_k": [1, 0.0, False, -1, 2**64],
    "rwkv_ms_mask_empty_slots": [True],
    "rwkv_ms_hybrid_mode": ["outer"],
    "rwkv_ms_write_address_gain": [0.125, 5e-324],
    "rwkv_ms_anchor_interval": [64],
    "rwkv_ms_anchor_capacity": [1],
    "rwkv_ms_anchor_top_k": [1],
    "rwkv_ms_outer_ffn_layers": [[0], {}, False],
    "num_memory_partitions": [2, True, 1.0],
    "num_global_memory_partitions": [1],
    "memory_partition_routing": ["hard"],
    "memory_partition_basis": ["separate"],
    "memory_partition_read_mode": ["sigmoid"],
    "tie_memory_partition_read_write": [True],
    "slot_read_top_k": [1],
    "global_memory_read_top_k": [1],
    "synthetic_memory_slots": [2, 2**64 + 1],
    "memory_reader_layers": [[0]],
    "latent_memory_layers": [[0], None],
}

NUMBERS = (
    "base_slice_ref_width", "online_gain", "memory_partition_sigmoid_gate_bias_init", "global_memory_gate_bias_init",
    "global_memory_read_logit_bias", "memory_reader_hidden_size", "memory_reader_residual_scale",
    "projected_kv_key_dim", "projected_kv_temperature", "projected_kv_update_cosine_threshold",
    "memory_write_proposals_per_message", "latent_memory_hidden_size", "latent_memory_residual_scale",
    "latent_memory_slots", "latent_memory_init_std", "latent_gate_init", "delta_o_rmsnorm_eps",
    "memory_fusion_gate_init", "delta_scale_max", "rwkv_ms_output_init_scale", "rwkv_ms_anchor_route_dim",
    "rwkv_ms_anchor_residual_scale", "rwkv_ms_anchor_null_bias_init", "rwkv_ms_hybrid_gain", "rwkv_ms_outer_ffn_gain",
)  # fmt: skip
TEXTS = ("output_init", "global_memory_merge_mode", "delta_scale_granularity")
INERT: dict[str, list[Any]] = {
    **{name: ["1"] for name in NUMBERS},
    **{name: [1] for name in TEXTS},
    "beta_bias_init": [True, None, [], {}, 1e300, -1e300, 3.5e38, 10**39],
    "global_memory_mode": [None, True, ["shared_rw"]],
    "memory_reader_read_only": [1, "true", None],
    "rwkv_ms_detach_read_scores": [0],
}

SIZES = {"rank": 256, "num_state_heads": 64, "rwkv_ms_num_states": 1024, "rwkv_ms_chunk_size": 1 << 24}
MODES = ("memory_backend", "memory_readout_mode", "rwkv_ms_boundary_mode")
TRUTHS = ("couple_lambda", "rankwise_gates")
READ = (*SIZES, *MODES, *TRUTHS, "alpha", "rwkv_ms_erase_gate", "state_update_mode", "target_layers", "delta_heads")


def cases() -> Iterator[Case]:
    """All of them."""
    yield from _table("config-unsupported", FIXED, "not implemented")
    yield from _table("config-value", INERT, "not of its type, or no number of f32")
    yield from _unknown()
    for name in READ:
        yield early(
            f"config-missing-{name}",
            "config-missing",
            ["config_json", name],
            "the runtime reads it",
            lambda sidecar, name=name: sidecar.config.pop(name),
        )
    yield from _read()


def _table(reason: str, table: dict[str, list[Any]], why: str) -> Iterator[Case]:
    for name, values in table.items():
        for i, value in enumerate(values):
            number = f"-{i + 1}" if len(values) > 1 else ""
            yield early(f"config-{name}{number}", reason, ["config_json", name], why, member(name, value))


def _unknown() -> Iterator[Case]:
    for what, name in {
        "new": "rwkv_ms_new",
        "upper-case": "Rank",
        "space": "rank ",
        "nul": "rank\0",
        "empty": "",
        "long": "x" * 3000,
        "newline": "x\ny",
        "cyrillic": "r\u0430nk",
    }.items():
        shown = [name] if name.isascii() and name.isprintable() and 0 < len(name) < 80 else []
        yield early(
            f"config-unknown-{what}", "config-unknown", ["config_json", *shown], "not on the list", member(name, 1)
        )
    # the two orders that members could be taken in, other than that of their bytes, would find the other one first
    yield early(
        "config-first-in-order-of-bytes",
        "config-unsupported",
        "normalize_qk",
        "members are taken in the order of their bytes, not of the text",
        member("z_new", 1),
        member("normalize_qk", False),
    )
    yield early(
        "config-upper-case-before-lower",
        "config-unknown",
        "Z_new",
        "members are taken in the order of their bytes, not of the alphabet",
        member("normalize_qk", False),
        member("Z_new", 1),
    )
    yield early(
        "config-list-before-members",
        "config-unsupported",
        "slot_read_top_k",
        "the whole of the list comes before what is read of it",
        member("rank", 0),
        member("slot_read_top_k", 1),
    )


def _read() -> Iterator[Case]:
    def refused(name: str, what: str, value: Any, reason: str = "config-value") -> Case:
        why = "another type, or out of range" if reason == "config-value" else "not implemented"
        return early(f"config-{name}-{what}", reason, ["config_json", name], why, member(name, value))

    for name, most in SIZES.items():
        values = {"0": 0, "negative": -1, "too-large": most + 1, "2p32-and-1": 2**32 + 1, "2p64-and-1": 2**64 + 1}
        values |= {"float": 1.0, "string": "1"}
        if name == "rank":
            values |= {"true": True, "null": None, "list": [1], "object": {}, "2p63": 2**63, "minus-2p63": -(2**63)}
        for what, value in values.items():
            yield refused(name, what, value)
        # the key cannot be right either, but what config_json may say is looked at before
        yield early(
            f"config-{name}-too-large-in-both",
            "config-value",
            ["config_json", name],
            "out of range",
            both(name, most + 1),
        )
    for name in MODES:
        yield refused(name, "other", "other", "config-unsupported")
        yield refused(name, "number", 1)
    yield refused("rwkv_ms_state_dtype", "bf16", "bf16", "config-unsupported")
    yield refused("rwkv_ms_state_dtype", "null", None)
    for what, value in (("0", 0), ("3", 3), ("float", 2.0), ("string", "2"), ("null", None)):
        yield refused("rwkv_ms_semantics_version", what, value)
    yield refused("state_update_mode", "other", "delta_rule", "config-unsupported")
    yield refused("state_update_mode", "number", 1)
    for name in TRUTHS:
        for what, value in (("1", 1), ("string", "true"), ("null", None)):
            yield refused(name, what, value)
    for name in ("alpha", "rwkv_ms_erase_gate"):
        for what, value in (("string", "1"), ("true", True), ("null", None), ("1e300", 1e300), ("3p5e38", -3.5e38)):
            yield refused(name, what, value)
    yield early(
        "config-alpha-integer-of-40-digits", "config-value", ["config_json", "alpha"], "no f32", member("alpha", 10**39)
    )
    yield early(
        "config-period-too-large",
        "config-value",
        ["rwkv_ms_chunk_size", "rwkv_ms_num_states"],
        "chunk * states is over 2^24",
        both("rwkv_ms_chunk_size", (1 << 24) // 3 + 1),
        both("rwkv_ms_num_states", 3),
    )
    yield early(
        "config-state-too-large",
        "config-value",
        ["rank", "rwkv_ms_num_states"],
        "heads * states * rank^2 is over 2^24",
        both("rank", 256),
        both("rwkv_ms_num_states", 257),
    )
    for key in ("delta_heads", "target_layers"):

        def unlike(sidecar: Sidecar, key: str = key) -> None:
            sidecar.config[key] = dict.fromkeys(map(str, sidecar.config[key]))

        yield early(f"config-{key}-object", "disagree", ["config_json", key], "no list, and so not the key's", unlike)
