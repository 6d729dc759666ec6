"""Sidecars that must load, however other writers spell them."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from typing import Any

from hostile.case import Case, Edit, add, both, case, drop, member, put
from hostile.config_cases import FIXED
from hostile.raw import (
    ARRAY,
    PEOPLE,
    SCALARS,
    STRING,
    TENSOR_BF16,
    TENSOR_F16,
    TENSOR_F32,
    U32,
    Sidecar,
    array,
    new_tensor,
    string,
)


def cases() -> Iterator[Case]:
    """All of them."""

    def good(what: str, why: str, *edits: Edit, **of: Any) -> Case:
        return case(f"sound-{what}", None, [], why, *edits, **of)

    yield good("v1", "format 1", version=1)
    yield good("v2", "format 2")
    yield good("v2-semantics-1", "format 2, semantics 1", both("rwkv_ms_semantics_version", 1))
    yield good("v1-semantics-and-state-type", "what version 1 may say", *_said_in_v1(), version=1)
    yield good("f16", "another type", kind=TENSOR_F16)
    yield good("f32", "another type", kind=TENSOR_F32)
    yield good("mixed-types", "each tensor has its own", _mixed, settle=True)
    yield good("lambda", "with lambda and lambda_b", couple_lambda=False)
    yield good("optional", "all that may be there is there", optional=True)
    yield good("two-layers", "one slides, one has full attention", layers=(0, 5), heads=("q", "o"))
    yield good("four-heads", "all heads, in another order", heads=("v", "o", "k", "q"))
    yield good("last-layer", "layer 4095", layers=(4095,))
    yield good("not-rankwise", "one gate a head", member("rankwise_gates", False))
    yield good("state-type-absent", "it means f32", drop("rwkv_ms_state_dtype"))
    yield good("fixed-members", "all that config_json may say", *_all_fixed())
    yield good("people-say-anything", "what people read is not parsed", *_for_people())

    yield good(
        "manifest-enum", "the types under the name of their enum", _manifest(gguf_type="GGMLQuantizationType.BF16")
    )
    yield good("manifest-lower-case", "the types in lower case", _manifest(gguf_type="bf16"))
    yield good(
        "manifest-extra-members", "members that nobody asked for", _manifest(torch_dtype=1, comment={"a": [None]})
    )
    yield good("manifest-reversed", "in another order", lambda sidecar: sidecar.manifest.reverse())
    yield good("manifest-pretty", "with spaces and line ends", _pretty("tensor_manifest_json"))
    yield good("config-pretty", "with spaces and line ends", _pretty("config_json"))
    yield good("manifest-leading-1", "shapes with a dimension of 1 in front", _leading_ones)
    yield good("manifest-no-leading-1", "shapes without", _no_leading_ones)
    yield good("dims-leading-1", "dimensions of 1 written, up to four", _long_dims)
    yield good("dims-no-leading-1", "dimensions of 1 left out", _short_dims)
    yield good(
        "attention-short-kind", "`sliding`", lambda sidecar: sidecar.attention[0].update(attention_kind="sliding")
    )
    yield good(
        "attention-shared-kv",
        "no k and v of its own",
        lambda sidecar: sidecar.attention[0].update(k_out=None, v_out=None),
    )
    yield good("attention-0", "no projections", lambda sidecar: sidecar.attention[0].update(k_out=0, v_out=0, o_out=0))
    yield good("attention-widths-absent", "left out instead of null", _no_widths)
    yield good(
        "attention-extra",
        "members that nobody asked for",
        lambda sidecar: sidecar.attention[0].update(compat_delta_heads=["k"], x={}),
    )
    yield good(
        "attention-heads-order",
        "the heads in another order",
        lambda sidecar: sidecar.attention[0].update(active_delta_heads=["o", "q"]),
        heads=("q", "o"),
    )
    yield good(
        "attention-heads-absent", "the heads left out", lambda sidecar: sidecar.attention[0].pop("active_delta_heads")
    )

    yield good("base-sha256-upper-case", "the hash in capitals", _upper_hash)
    yield good("no-last-padding", "the padding of the last tensor is missing", _cut(0))
    yield good("some-last-padding", "it is there in part", _cut(7))
    yield good("general-keys", "keys that are passed over, of all types", *_general())
    yield good("alignment", "said, as it is", add("general.alignment", 32, U32))
    yield good("keys-reversed", "keys in another order", lambda sidecar: sidecar.keys.reverse())
    yield good("tensors-reversed", "tensors in another order", lambda sidecar: sidecar.tensors.reverse())
    yield good("alpha-0p1", "the same in f32", member("alpha", 0.1), put("alpha", 0.1))
    yield good("alpha-integer", "a number may be an integer", member("alpha", 2))
    yield good("alpha-tiny", "0 in f32", member("alpha", 1e-60), put("alpha", 0.0))
    yield good("numbers", "of f32 in all spellings", _spelled)
    yield good("json-8-deep", "as deep as may be", _manifest(x=[[[[[[0]]]]]]))
    yield good("json-escapes", "a pair of surrogates, a NUL, all escapes", _escaped)
    yield good("largest-sizes", "at the limits", both("rwkv_ms_chunk_size", 1 << 14), both("rwkv_ms_num_states", 1024))
    yield good(
        "f32-limit", "the largest f32", member("alpha", 3.4028234663852886e38), put("alpha", 3.4028234663852886e38)
    )


def _said_in_v1() -> list[Edit]:
    return [
        add("delta_mem.rwkv_ms_semantics_version", 1, U32),
        add("delta_mem.rwkv_ms_state_dtype", "f32"),
        member("rwkv_ms_semantics_version", 1),
        member("rwkv_ms_state_dtype", "f32"),
    ]


def _mixed(sidecar: Sidecar) -> None:
    kinds = (TENSOR_BF16, TENSOR_F32, TENSOR_F16)
    sidecar.tensors = [
        new_tensor(str(tensor.name), tensor.dims[::-1], kinds[i % 3]) for i, tensor in enumerate(sidecar.tensors)
    ]


# the values that FIXED's others stand beside
IMPLEMENTED = {
    "memory_write_source": "learned_hidden", "memory_write_granularity": "token", "memory_fusion_mode": "add",
    "memory_fusion_placement": "attention_output", "memory_fusion_residual_scale": 1,
    "memory_fusion_residual_scale_max": 1.0, "target_modules": ["self_attn"], "delta_o_rmsnorm": False,
    "trainable_delta_scale": False, "delta_scale_init": 1.0, "delta_scale_parameterization": "alpha_over_rank",
    "normalize_qk": True, "rwkv_ms_write_mode": "recurrent", "rwkv_ms_read_temperature": 1.0, "rwkv_ms_read_top_k": 0,
    "rwkv_ms_mask_empty_slots": False, "rwkv_ms_hybrid_mode": "residual", "rwkv_ms_write_address_gain": 0,
    "rwkv_ms_anchor_interval": 0, "rwkv_ms_anchor_capacity": 0, "rwkv_ms_anchor_top_k": 0,
    "rwkv_ms_outer_ffn_layers": [], "num_memory_partitions": 1, "num_global_memory_partitions": 0,
    "memory_partition_routing": "soft", "memory_partition_basis": "shared", "memory_partition_read_mode": "softmax",
    "tie_memory_partition_read_write": False, "slot_read_top_k": 0, "global_memory_read_top_k": 0,
    "synthetic_memory_slots": 1, "memory_reader_layers": [], "latent_memory_layers": [],
}  # fmt: skip
assert IMPLEMENTED.keys() == FIXED.keys()


def _all_fixed() -> list[Edit]:
    return [member(name, value) for name, value in IMPLEMENTED.items()]


def _for_people() -> list[Edit]:
    texts = ("", "{", "[" * 50, '{"a":1,"a":NaN}', "\ufeff", "\0", "\u202e", "null", "x" * 300)
    return [add(f"delta_mem.{name}", text) for name, text in zip(PEOPLE, texts, strict=True)]


def _manifest(**members: object) -> Edit:
    def edit(sidecar: Sidecar) -> None:
        for entry in sidecar.manifest:
            entry.update(members)

    return edit


def _pretty(key: str) -> Edit:
    return lambda sidecar: put(key, "\r\n\t " + json.dumps(sidecar.key(key).value, indent="\t") + " \n")(sidecar)


def _leading_ones(sidecar: Sidecar) -> None:
    for entry in sidecar.manifest:
        entry["shape"] = [1, 1, *entry["shape"]]


def _no_leading_ones(sidecar: Sidecar) -> None:
    for entry in sidecar.manifest:
        while len(entry["shape"]) > 1 and entry["shape"][0] == 1:
            del entry["shape"][0]


def _long_dims(sidecar: Sidecar) -> None:
    for tensor in sidecar.tensors:
        tensor.dims = [*tensor.dims, 1, 1, 1][:4]


def _short_dims(sidecar: Sidecar) -> None:
    for tensor in sidecar.tensors:
        while len(tensor.dims) > 1 and tensor.dims[-1] == 1:
            tensor.dims.pop()


def _no_widths(sidecar: Sidecar) -> None:
    for head in "kvo":
        del sidecar.attention[0][f"{head}_out"]


def _upper_hash(sidecar: Sidecar) -> None:
    key = sidecar.key("base_gguf_sha256")
    key.value = key.value.upper()


def _cut(kept: int) -> Edit:
    """Without the last tensor's padding, but for some bytes."""

    def edit(sidecar: Sidecar) -> None:
        sidecar.cut = -len(sidecar.tensors[-1].data) % 32 - kept

    return edit


def _general() -> list[Edit]:
    edits = [add(f"general.scalar.{kind}", bytes(8)[: _size(kind)], kind) for kind in SCALARS]
    edits += [add(f"general.array.{kind}", array(kind, bytes(3 * _size(kind)), 3), ARRAY) for kind in SCALARS]
    edits += [add(f"general.empty.{kind}", array(kind, b"", 0), ARRAY) for kind in (*SCALARS, STRING)]
    edits += [add("general.tags", array(STRING, string("") + string("é"), 2), ARRAY)]
    edits += [add("general.", "x"), add("general.\u202e\n", "\0\x1b[2J")]
    return edits


def _size(kind: int) -> int:
    return struct.calcsize(SCALARS[kind])


def _spelled(sidecar: Sidecar) -> None:
    names = ("beta_bias_init", "base_slice_ref_width", "online_gain", "latent_gate_init", "delta_scale_max")
    texts = ("-0", "1E+2", "18446744073709551616", "-9223372036854775809", "1e-400")
    members = "".join(f',"{name}":{text}' for name, text in zip(names, texts, strict=True))
    put("config_json", json.dumps(sidecar.config)[:-1] + members + "}")(sidecar)


def _escaped(sidecar: Sidecar) -> None:
    text = r'{"output_init":"\ud83d\ude00\u0000\"\\\/\b\f\n\r\t","\u0072ank":1,'
    put("config_json", text + json.dumps({k: v for k, v in sidecar.config.items() if k != "rank"})[1:])(sidecar)
