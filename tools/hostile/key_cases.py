"""Faults of the keys: their types, their values, where two of them disagree."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from hostile.case import Case, Edit, add, case, drop, early, member, put
from hostile.raw import ARRAY, F32, F64, I32, PEOPLE, SCHEMA, STRING, U8, U32, U64, Key, array, sound

OPTIONAL = ("rwkv_ms_state_dtype", *PEOPLE)


def cases() -> Iterator[Case]:
    """All of them."""
    for key in sound(optional=True).keys[1:]:
        yield from _presence(key)
    yield from _versions()
    yield from _values()
    yield from _unknown()
    yield from _disagreements()
    yield from _attention()


def _presence(key: Key) -> Iterator[Case]:
    name = str(key.name).removeprefix("delta_mem.")
    if name not in OPTIONAL:
        yield early(f"key-missing-{name}", "key-missing", str(key.name), "it must be there", drop(name))
    others: dict[str, Edit] = {
        "array": put(name, array(U8, b"x", 1), ARRAY),
        "string": put(name, "1", STRING),
        "u32": put(name, 1, U32),
        "u64": put(name, 1, U64),
        "i32": put(name, 1, I32),
        "f64": put(name, 1.0, F64),
    }
    wrong = {
        STRING: ("array", "u32"),
        U32: ("array", "string", "u64", "i32"),
        U64: ("array", "string", "u32"),
        F32: ("array", "string", "f64", "u32"),
    }
    for other in wrong[key.type]:
        yield early(
            f"key-type-{name}-{other}",
            "key-type",
            str(key.name),
            f"its type is {other}",
            others[other],
            optional=name in PEOPLE,
        )


def _versions() -> Iterator[Case]:
    name = "delta_mem.format_version"
    for value in (0, 3, 2**32 - 1):
        yield early(f"format-version-{value}", "format-version", name, "not 1 or 2", put("format_version", value))
    yield early(
        "format-version-first",
        "format-version",
        name,
        "what else is wrong belongs to another version",
        put("format_version", 3),
        drop("schema"),
        add("delta_mem.new", "x"),
    )
    for version, value in ((1, 2), (2, 1)):
        yield early(
            f"schema-of-version-{value}-in-{version}",
            "schema",
            "delta_mem.schema",
            "of the other version",
            put("schema", f"{SCHEMA}{value}"),
            version=version,
        )
    for what, text in (
        ("empty", ""),
        ("v3", f"{SCHEMA}3"),
        ("upper-case", f"{SCHEMA}2".upper()),
        ("nul", f"{SCHEMA}2\0"),
    ):
        yield early(f"schema-{what}", "schema", "delta_mem.schema", "another schema", put("schema", text))
    name = "delta_mem.rwkv_ms_semantics_version"
    for value in (0, 3, 2**32 - 1):
        yield early(
            f"semantics-{value}", "semantics-version", name, "not 1 or 2", put("rwkv_ms_semantics_version", value)
        )
    for value in (0, 2):
        yield early(
            f"semantics-{value}-in-version-1",
            "semantics-version",
            name,
            "format 1 has semantics 1 only",
            add(name, value, U32),
            member("rwkv_ms_semantics_version", value),
            version=1,
        )
    for key, others in {
        "rwkv_ms_state_dtype": ("bf16", "F32", ""),
        "tensor_name_format": ("full", "", "compact_with_source_name_manifest "),
        "memory_backend": ("delta_rule", ""),
        "memory_readout_mode": ("projected_kv", ""),
        "rwkv_ms_boundary_mode": ("message", ""),
    }.items():
        for value in others:
            yield early(
                f"unsupported-{key}-{value.strip() or 'empty'}{'-space' if value.endswith(' ') else ''}",
                "unsupported",
                f"delta_mem.{key}",
                "not implemented",
                put(key, value),
            )


def _values() -> Iterator[Case]:
    good = "0123456789abcdef" * 4
    for what, text in {
        "63-digits": good[:-1],
        "65-digits": good + "0",
        "empty": "",
        "letter-g": "g" + good[1:],
        "space": good[:-1] + " ",
        "newline": good + "\n",
        "nul": good + "\0",
        "0x": "0x" + good[2:],
        "full-width-digits": "\uff11" * 64,
    }.items():
        yield early(
            f"base-sha256-{what}",
            "key-value",
            "delta_mem.base_gguf_sha256",
            "not 64 hex digits",
            put("base_gguf_sha256", text),
        )
    for what, value in (("nan", math.nan), ("infinity", math.inf), ("minus-infinity", -math.inf)):
        yield early(f"alpha-{what}", "key-value", "delta_mem.alpha", "not finite", put("alpha", value))
    lists: dict[str, dict[str, Any]] = {
        "delta_heads": {
            "empty": [],
            "unknown": ["x"],
            "twice": ["q", "q"],
            "upper-case": ["Q"],
            "two-letters": ["qk"],
            "no-letter": [""],
            "nul": ["q\0"],
            "number": [1],
            "null": [None],
            "list": [["q"]],
        },
        "target_layers": {
            "empty": [],
            "negative": [-1],
            "4096": [4096],
            "2p32": [2**32],
            "2p64": [2**64],
            "twice": [0, 0],
            "descending": [5, 0],
            "float": [0.0],
            "true": [True],
            "string": ["0"],
            "null": [None],
            "list": [[0]],
        },
    }
    for name, values in lists.items():
        for what, value in values.items():
            yield early(
                f"{name.replace('_', '-')}-{what}",
                "key-value",
                f"delta_mem.{name}_json",
                "key and config have it, and it is not one that may be",
                put(f"{name}_json", value),
                member(name, value),
            )


def _unknown() -> Iterator[Case]:
    for what, name in {
        "delta-mem": "delta_mem.new",
        "delta-mem-nothing": "delta_mem.",
        "other-prefix": "rwkv_ms.rank",
        "no-prefix": "rank",
        "gguf": "GGUF.version",
        "split": "split.count",
        "empty": "",
        "general": "general",
        "general-other": "generally.name",
        "general-upper-case": "General.name",
        "nul": "delta_mem.rank\0",
        "nul-between": "delta_mem.\0rank",
        "space": "delta_mem.rank ",
        "quote": "delta_mem.'rank'",
        "terminal-escape": "delta_mem.\x1b[2J\x1b[31mrank",
        "newline": "delta_mem.new\nmemory.gguf: [ok] sound",
        "right-to-left": "delta_mem.\u202e\u2066knar",
        "long": "delta_mem." + "x" * 3000,
    }.items():
        shown = [name] if name.isascii() and name.isprintable() and "'" not in name and len(name) < 80 else []
        yield early(f"key-unknown-{what}", "key-unknown", shown, "no key of a sidecar", add(name, "x"))
    yield early(
        "key-unknown-first-of-two",
        "key-unknown",
        "delta_mem.new2",
        "in the order of the file",
        add("delta_mem.new2", "x"),
        add("delta_mem.new1", "x"),
    )


def _disagreements() -> Iterator[Case]:
    for name in ("rank", "num_state_heads", "rwkv_ms_num_states", "rwkv_ms_chunk_size"):
        for value in (0, 2, 2**32 - 1):
            yield early(
                f"disagree-{name}-{value}", "disagree", name, "the key is not what config_json says", put(name, value)
            )
    yield early("disagree-alpha", "disagree", "alpha", "the key is not what config_json says", put("alpha", 2.0000002))
    yield early(
        "disagree-semantics",
        "disagree",
        "rwkv_ms_semantics_version",
        "config_json says 1",
        member("rwkv_ms_semantics_version", 1),
    )
    yield early(
        "disagree-delta-heads",
        "disagree",
        "delta_heads",
        "config_json has one head more",
        member("delta_heads", ["q", "o"]),
    )
    yield early(
        "disagree-delta-heads-order",
        "disagree",
        "delta_heads",
        "config_json has another order",
        member("delta_heads", ["o", "q"]),
        heads=("q", "o"),
    )
    yield early(
        "disagree-target-layers", "disagree", "target_layers", "config_json says 1", member("target_layers", [1])
    )
    for what, edit in {
        "none": lambda sidecar: sidecar.attention.clear(),
        "one-more": lambda sidecar: sidecar.attention.append(sidecar.attention[0] | {"layer": 1}),
    }.items():
        yield early(
            f"disagree-attention-{what}", "disagree", "per_layer_attention_json", "as many entries as layers", edit
        )
    for name in ("tensor_count", "total_numel", "total_bytes"):
        for what, add_ in (("one-more", 1), ("one-less", -1)):
            yield early(
                f"disagree-{name}-{what}",
                "disagree",
                f"delta_mem.{name}",
                "not that of the file",
                lambda sidecar, name=name, add_=add_: put(name, sidecar.key(name).value + add_)(sidecar),
            )
        most = 2 ** (32 if name == "tensor_count" else 64) - 1
        yield early(f"disagree-{name}-most", "disagree", f"delta_mem.{name}", "not that of the file", put(name, most))


def _attention() -> Iterator[Case]:
    key = "per_layer_attention_json"
    for what, value in (("null", None), ("list", []), ("string", "0"), ("number", 0), ("empty", {})):
        yield early(f"attention-{what}", "attention", key, "no entry of layer 0", put(key, [value]))
    for field, values in {
        "layer": {"other": 1, "float": 0.0, "false": False, "string": "0", "null": None, "2p64": 2**64},
        "attention_kind": {"other": "chunked_attention", "upper-case": "Sliding", "number": 1, "null": None},
        "q_out": {
            "null": None, "0": 0, "negative": -1, "float": 3.0, "true": True, "string": "3", "list": [3],
            "2p20-and-1": 2**20 + 1, "2p32-and-3": 2**32 + 3, "2p64-and-3": 2**64 + 3,
        },
        "k_out": {"negative": -1, "float": 1.5, "true": True, "string": "1", "object": {}, "2p64": 2**64},
        "o_out": {"negative": -1, "float": 2.0, "true": True, "string": "2", "2p63": 2**63},
        "active_delta_heads": {
            "none": [], "other": ["k"], "one-more": ["q", "o"], "string": "q", "number": [1], "object": {"q": 1},
        },
    }.items():  # fmt: skip
        for what, value in values.items():
            yield early(
                f"attention-{field}-{what}",
                "attention",
                [key, field],
                "not what the table says",
                lambda sidecar, field=field, value=value: sidecar.attention[0].update({field: value}),
            )
    for field in ("layer", "attention_kind", "q_out"):
        yield early(
            f"attention-{field}-missing",
            "attention",
            [key, field],
            "it must be there",
            lambda sidecar, field=field: sidecar.attention[0].pop(field),
        )
    yield early(
        "attention-order",
        "attention",
        key,
        "the entries of two layers in each other's place",
        lambda sidecar: sidecar.attention.reverse(),
        layers=(0, 5),
    )
    for what, value in (("more", 3), ("fewer", 1)):
        yield case(
            f"attention-o-out-{what}",
            "attention",
            "o_out",
            "neither H nor absent",
            lambda sidecar, value=value: sidecar.attention[0].update(o_out=value),
        )
