"""Sidecars of version 3, of both kinds of memory: what only they have. All else is as in version 2."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from hostile.case import Case, Edit, add, both, drop, member, put
from hostile.raw import F32, STRING, U32, U64, WIDTH, H, Sidecar, new_tensor, values
from hostile.raw_3 import PREFIX, sound_3

KINDS = ("rwkv_ms", "delta_rule")

# of a delta rule: members with the one value that is implemented, and others
FIXED: dict[str, list[Any]] = {
    "memory_write_granularity": ["message_mean", "sentence_mean", None],
    "memory_write_source": ["attention_input"],
    "memory_fusion_mode": ["gated"],
    "num_memory_partitions": [4, 1.0],
    "num_global_memory_partitions": [1],
    "memory_partition_routing": ["hard"],
    "memory_partition_basis": ["separate"],
    "memory_partition_read_mode": ["sigmoid"],
    "tie_memory_partition_read_write": [True],
    "slot_read_top_k": [1],
    "global_memory_mode": ["read_only"],
    "global_memory_merge_mode": ["concat"],
    "global_memory_read_top_k": [1],
    "global_memory_read_logit_bias": [0.5],
    "memory_reader_layers": [[0]],
    "memory_reader_hidden_size": [512, 1024.0],
    "memory_reader_residual_scale": [0.2],
    "memory_reader_read_only": [False],
    "memory_write_proposals_per_message": [1],
    "synthetic_memory_slots": [2],
    "latent_memory_layers": [[0]],
    "latent_memory_hidden_size": [1],
    "latent_memory_residual_scale": [0],
    "latent_memory_slots": [5],
    "target_modules": [["self_attn", "mlp"]],
    "delta_scale_parameterization": ["alpha"],
}
IMPLEMENTED = {
    "memory_write_granularity": "token", "memory_write_source": "learned_hidden", "memory_fusion_mode": "add",
    "num_memory_partitions": 1, "num_global_memory_partitions": 0, "memory_partition_routing": "soft",
    "memory_partition_basis": "shared", "memory_partition_read_mode": "softmax",
    "tie_memory_partition_read_write": False, "slot_read_top_k": 0, "global_memory_mode": "shared_rw",
    "global_memory_merge_mode": "gated_residual", "global_memory_read_top_k": 0, "global_memory_read_logit_bias": 0,
    "memory_reader_layers": [], "memory_reader_hidden_size": 1024, "memory_reader_residual_scale": 0.1,
    "memory_reader_read_only": True, "memory_write_proposals_per_message": 2, "synthetic_memory_slots": 1,
    "latent_memory_layers": [], "latent_memory_hidden_size": 1024, "latent_memory_residual_scale": 0.1,
    "latent_memory_slots": 4, "target_modules": ["self_attn"], "delta_scale_parameterization": "alpha_over_rank",
}  # fmt: skip
INITIAL = {
    "beta_bias_init": -2, "output_init": "zero", "base_slice_ref_width": 16, "online_gain": 0.5,
    "delta_scale_init": 0.5, "memory_partition_sigmoid_gate_bias_init": 1, "global_memory_gate_bias_init": 1,
    "latent_memory_init_std": 1, "latent_gate_init": 1,
    # what a file for both kinds has of the other one
    "rwkv_ms_num_states": 4, "rwkv_ms_chunk_size": 1024, "rwkv_ms_boundary_mode": "x", "rwkv_ms_erase_gate": 0,
    "rwkv_ms_semantics_version": 9, "rwkv_ms_state_dtype": "x", "rwkv_ms_read_top_k": 0, "projected_kv_key_dim": 1,
}  # fmt: skip


def cases() -> Iterator[Case]:
    """All of them."""
    yield from _sound()
    yield from _versions()
    yield from _keys()
    yield from _config()
    yield from _tensors()


def _made(
    name: str, reason: str | None, names: str | Sequence[str], why: str, *edits: Edit, settle: bool = False, **of: Any
) -> Case:
    sidecar = sound_3(**of)
    for edit in edits:
        edit(sidecar)
    if settle:
        sidecar.settle()
    start = "sound-v3" if reason is None else "v3"
    return Case(f"{start}-{name}", reason, [names] if isinstance(names, str) else names, why, sidecar.compose())


def _early(name: str, reason: str | None, names: str | Sequence[str], why: str, *edits: Edit, **of: Any) -> Case:
    return _made(name, reason, names, why, *edits, head=True, **of)


def _sound() -> Iterator[Case]:
    def good(name: str, why: str, *edits: Edit, **of: Any) -> Case:
        return _made(name, None, [], why, *edits, **of)

    for kind in KINDS:
        short = kind.replace("_", "-")
        yield good(short, "version 3", kind=kind)
        yield good(f"{short}-norm", "rows of q and k permuted", kind=kind, norm=True, heads=("q", "k"))
        yield good(f"{short}-optional", "all that may be there is there", kind=kind, optional=True)
        yield good(
            f"{short}-all-layers",
            "the config's empty list",
            member("target_layers", []),
            kind=kind,
            layers=(0, 1),
        )
        yield good(f"{short}-language-model", "the other prefix of names", *_other_prefix(), settle=True, kind=kind)
    yield good("semantics-1", "of an RWKV-MS", both("rwkv_ms_semantics_version", 1), kind="rwkv_ms")
    yield good("lambda", "separate gates", couple_lambda=False)
    yield good("scale-layer", "one trained scale", scale="layer", heads=("q", "o"))
    yield good("scale-head", "four of them", scale="head")
    yield good("o-norm", "the delta of o is normed", o_norm=True, heads=("o",))
    yield good("o-norm-idle", "and may be there where o is not active", o_norm=True)
    yield good("no-heads", "none at all", heads=())
    yield good("empty-config", "all members have their default", *_defaults(), settle=True, heads=("q", "k", "v", "o"))
    yield good("backend-named", "it may name its kind", member("memory_backend", "delta_rule"))
    yield good("fixed-members", "all that config_json may say", *(member(k, v) for k, v in IMPLEMENTED.items()))
    yield good("initial-values", "what says nothing to the maths", *(member(k, v) for k, v in INITIAL.items()))
    yield good("no-norm-of-qk", "plain products", member("normalize_qk", False))
    yield good("idle-zeros", "a head that is not active may have zeros", _idle(bytes(2)), settle=True)
    yield good("idle-minus-zeros", "of either sign", _idle(b"\x00\x80"), settle=True)
    yield good("other-base", "any name that llama.cpp could give", put("base_architecture", "gpt-oss.2_x"))


def _versions() -> Iterator[Case]:
    name = f"{PREFIX}format_version"
    for value in (0, 2, 4):
        yield _early(f"format-version-{value}", "format-version", name, "not 3", put("format_version", value))
    for what, text in (("of-2", "delta_mem_rwkv_ms_memory_gguf_sidecar.v2"), ("4", "memory_adapter_gguf_sidecar.v4")):
        yield _early(f"schema-{what}", "schema", f"{PREFIX}schema", "another schema", put("schema", text))
    for what, text in (("unknown", "hrm"), ("empty", ""), ("upper-case", "DELTA_RULE"), ("nul", "delta_rule\0")):
        yield _early(f"kind-{what}", "unsupported", f"{PREFIX}kind", "not known", put("kind", text))
    yield _early(
        "kind-of-the-other", "key-unknown", "rwkv_ms_", "an RWKV-MS's keys", put("kind", "delta_rule"), kind="rwkv_ms"
    )
    yield _early(
        "kind-without-its-keys",
        "key-missing",
        "rwkv_ms_semantics_version",
        "a delta rule's keys",
        put("kind", "rwkv_ms"),
    )
    name = f"{PREFIX}rwkv_ms_semantics_version"
    for value in (0, 3):
        yield _early(
            f"semantics-{value}",
            "semantics-version",
            name,
            "1 or 2",
            put("rwkv_ms_semantics_version", value),
            kind="rwkv_ms",
        )
    yield _early(
        "architecture-of-2",
        "key-missing",
        "delta_mem.format_version",
        "the keys of version 3 under the architecture of versions 1 and 2",
        put("general.architecture", "rwkv_ms_memory"),
    )
    yield _early(
        "schema-before-kind", "schema", "schema", "in the order of the page", put("schema", "x"), put("kind", "x")
    )


def _keys() -> Iterator[Case]:
    texts = ("kind", "base_architecture", "source_prefix", "qk_row_order")
    for name in texts:
        yield _early(f"key-missing-{name}", "key-missing", PREFIX + name, "it must be there", drop(name))
        yield _early(f"key-type-{name}", "key-type", PREFIX + name, "its type is u32", put(name, 1, U32))
    for name in ("rwkv_ms_semantics_version", "rwkv_ms_num_states", "rwkv_ms_chunk_size", "rwkv_ms_boundary_mode"):
        yield _early(f"key-missing-{name}", "key-missing", PREFIX + name, "of an RWKV-MS", drop(name), kind="rwkv_ms")
    for name, kind, value in (
        ("rwkv_ms_semantics_version", U32, 1), ("rwkv_ms_state_dtype", STRING, "f32"), ("rwkv_ms_num_states", U32, 1),
        ("rwkv_ms_chunk_size", U32, 4), ("rwkv_ms_boundary_mode", STRING, "fixed_chunk"),
    ):  # fmt: skip
        yield _early(
            f"key-unknown-{name}", "key-unknown", PREFIX + name, "an RWKV-MS has it", add(PREFIX + name, value, kind)
        )
    yield _early(
        "key-unknown-backend",
        "key-unknown",
        "memory_backend",
        "kind says it",
        add(f"{PREFIX}memory_backend", "delta_rule"),
    )
    yield _early("key-unknown-of-2", "key-unknown", "delta_mem.rank", "of version 2", add("delta_mem.rank", 1, U32))
    yield _early("key-unknown-nothing", "key-unknown", PREFIX, "no name", add(PREFIX, "x"))
    yield _early(
        "key-type-omitted",
        "key-type",
        "omitted_tensors_json",
        "no string",
        add(f"{PREFIX}omitted_tensors_json", 1, U32),
    )
    for what, text in {
        "empty": "", "upper-case": "Qwen3", "space": "qwen 3", "dash": "-qwen3", "long": "q" * 64, "nul": "qwen3\0",
    }.items():  # fmt: skip
        yield _early(
            f"base-architecture-{what}",
            "key-value",
            f"{PREFIX}base_architecture",
            "no name",
            put("base_architecture", text),
        )
    for name, others in {
        "source_prefix": ("", "model.layers", "transformer.h."), "qk_row_order": ("", "neox", "norm "),
        "memory_readout_mode": ("projected_kv",), "tensor_name_format": ("full",),
    }.items():  # fmt: skip
        for i, text in enumerate(others):
            yield _early(
                f"unsupported-{name}-{i + 1}", "unsupported", PREFIX + name, "not implemented", put(name, text)
            )
    name = f"{PREFIX}rope_head_dim"
    yield _early("rope-head-dim-missing", "key-missing", name, "of permuted rows", drop("rope_head_dim"), norm=True)
    yield _early("rope-head-dim-type", "key-type", name, "a u32", put("rope_head_dim", 2, U64), norm=True)
    for value in (0, 1, 3, (1 << 20) + 2):
        yield _early(
            f"rope-head-dim-{value}", "key-value", name, "even, from 2", put("rope_head_dim", value), norm=True
        )
    yield _early("rope-head-dim-of-hf", "key-value", name, "no rows are permuted", add(name, 2, U32))
    for head, width in (("q", 3), ("k", 1)):
        yield _early(
            f"attention-{head}-not-in-heads",
            "attention",
            f"{head}_out",
            "no multiple of rope_head_dim",
            lambda sidecar, head=head, width=width: sidecar.attention[0].update({f"{head}_out": width}),
            norm=True,
        )
    yield _early(
        "heads-of-rwkv-ms-empty", "key-value", "delta_heads_json", "such a file changes nothing",
        put("delta_heads_json", []), member("delta_heads", []), kind="rwkv_ms",
    )  # fmt: skip
    yield _early(
        "heads-disagree", "disagree", "delta_heads", "the default is all four", lambda s: s.config.pop("delta_heads")
    )
    yield _early(
        "layers-left-out", "disagree", "target_layers", "the config's empty list is all layers",
        member("target_layers", []), layers=(0, 2),
    )  # fmt: skip
    yield _early("layers-disagree", "disagree", "target_layers", "another list", member("target_layers", [1]))
    yield _early("alpha-disagrees", "disagree", "alpha", "the default is 16", lambda s: s.config.pop("alpha"))
    yield _early("rank-disagrees", "disagree", "rank", "the default is 8", lambda s: s.config.pop("rank"))
    yield _early("alpha-infinite", "key-value", "alpha", "not finite", put("alpha", float("inf"), F32))


def _config() -> Iterator[Case]:
    for name, others in FIXED.items():
        for i, value in enumerate(others):
            yield _early(
                f"config-{name}-{i + 1}",
                "config-unsupported",
                ["config_json", name],
                "not implemented",
                member(name, value),
            )
    for name, value in (
        ("delta_scale_init", "1"),
        ("output_init", 1),
        ("rwkv_ms_num_states", "4"),
        ("online_gain", None),
    ):
        yield _early(f"config-{name}-type", "config-value", ["config_json", name], "another type", member(name, value))
    for name in ("memory_new", "rwkv_ms_new"):
        yield _early(f"config-{name}", "config-unknown", ["config_json", name], "not on the list", member(name, 1))
    for name, values_ in {
        "normalize_qk": (1, None), "delta_o_rmsnorm": (0,), "delta_o_rmsnorm_eps": (-1e-6, "1", True, 1e300),
        "trainable_delta_scale": (1,), "delta_scale_max": (None, 1e39), "delta_scale_granularity": (1,),
        "couple_lambda": ("true",), "rank": (0, 257, 1.0), "num_state_heads": (65,), "memory_backend": (None,),
    }.items():  # fmt: skip
        for i, value in enumerate(values_):
            yield _early(
                f"config-{name}-{i + 1}", "config-value", ["config_json", name], "out of range", member(name, value)
            )
    for name, value in (
        ("delta_scale_granularity", "token"), ("memory_backend", "rwkv_ms"), ("memory_readout_mode", "projected_kv"),
        ("state_update_mode", "none"),
    ):  # fmt: skip
        yield _early(
            f"config-{name}-other", "config-unsupported", ["config_json", name], "not implemented", member(name, value)
        )
    yield _early(
        "config-backend-of-rwkv-ms", "config-unsupported", "memory_backend", "the kind says otherwise",
        member("memory_backend", "delta_rule"), kind="rwkv_ms",
    )  # fmt: skip
    yield _early(
        "config-backend-of-rwkv-ms-missing", "config-missing", "memory_backend", "only a delta rule need not name it",
        lambda sidecar: sidecar.config.pop("memory_backend"), kind="rwkv_ms",
    )  # fmt: skip


def _tensors() -> Iterator[Case]:
    def without(name: str, **of: Any) -> Case:
        def edit(sidecar: Sidecar) -> None:
            sidecar.tensors.remove(sidecar.tensor(f"blk.0.{name}"))

        return _made(f"tensor-missing-{name}", "tensor-missing", name, "not optional here", edit, settle=True, **of)

    for name in ("mem_q", "mem_k", "mem_v", "beta", "beta_b", "delta_q"):
        yield without(name)
    yield without("lambda_b", couple_lambda=False)
    yield without("delta_scale", scale="layer")
    yield without("delta_o_norm", o_norm=True, heads=("o",))
    for name in ("delta_scale", "delta_o_norm", "lambda", "rwkv.w0", "bias"):
        yield _made(f"tensor-unknown-{name}", "tensor-unknown", name, "no place for it", _more(name, (1,)), settle=True)
    yield _made(
        "tensor-unknown-scale-of-rwkv-ms", "tensor-unknown", "delta_scale", "of a delta rule",
        _more("delta_scale", (1,)), settle=True, kind="rwkv_ms",
    )  # fmt: skip
    yield _made(
        "tensor-inactive", "tensor-inactive", "blk.0.delta_v", "a head that is not active is not zero", _idle(b"\1\0"),
        settle=True,
    )  # fmt: skip
    # a loader that broadcasts would take each of these
    for what, name, shape, of in (
        ("beta-b-longer", "beta_b", (1, 1), {}),
        ("beta-for-all", "beta", (1, 1), {}),
        ("mem-q-for-all", "mem_q", (1, 1), {}),
        ("delta-q-for-all", "delta_q", (1, 1), {}),
        ("delta-q-vector", "delta_q", (1,), {}),
        ("scale-for-all", "delta_scale", (1,), {"scale": "head"}),
        ("scale-matrix", "delta_scale", (1, 4), {"scale": "head"}),
        ("o-norm-for-all", "delta_o_norm", (1,), {"o_norm": True, "heads": ("o",)}),
        ("mem-v-longer", "mem_v", (1, 1, H), {}),
    ):
        yield _made(
            f"tensor-shape-{what}", "tensor-shape", f"blk.0.{name}", "it could be broadcast", _reshaped(name, shape),
            settle=True, **of,
        )  # fmt: skip
    for what, start in (("language-model", "model.language_model.layers."), ("other", "transformer.h.")):
        yield _made(
            f"manifest-source-of-{what}", "manifest", "blk.0.beta", "another prefix than the file's",
            lambda sidecar, start=start: sidecar.manifest[0].update(source_name=f"{start}0.self_attn.beta_proj"),
        )  # fmt: skip
    yield _made(
        "manifest-source-of-scale", "manifest", "delta_scale", "the name of another tensor",
        lambda sidecar: [e.update(source_name="model.layers.0.self_attn.delta_scale_proj") for e in sidecar.manifest
                         if e["name"].endswith("delta_scale")],
        scale="layer",
    )  # fmt: skip
    for key in ("tensor_count", "total_numel", "total_bytes"):
        yield _early(f"disagree-{key}", "disagree", PREFIX + key, "not that of the file", put(key, 1))


def _other_prefix() -> list[Edit]:
    return [put("source_prefix", "model.language_model.layers."), put("base_architecture", "gemma4")]


def _defaults() -> list[Edit]:
    """An empty config, with a file that fits: rank 8."""

    def edit(sidecar: Sidecar) -> None:
        sidecar.config.clear()
        for key, value in (("rank", 8), ("alpha", 16.0)):
            sidecar.key(key).value = value
        shapes = {"beta": (8, H), "beta_b": (8,)} | {f"mem_{x}": (8, H) for x in "qkv"}
        shapes |= {f"delta_{x}": (WIDTH[x], 8) for x in "qkvo"}
        sidecar.tensors = [new_tensor(f"blk.0.{name}", shape) for name, shape in sorted(shapes.items())]

    return [edit]


def _idle(value: bytes) -> Edit:
    """A delta of v, which is not active, with a value of two bytes."""

    def edit(sidecar: Sidecar) -> None:
        tensor = new_tensor("blk.0.delta_v", (1, 1))
        tensor.data = value
        sidecar.tensors.append(tensor)

    return edit


def _more(name: str, shape: Sequence[int]) -> Edit:
    return lambda sidecar: sidecar.tensors.append(new_tensor(f"blk.0.{name}", shape))


def _reshaped(name: str, shape: Sequence[int]) -> Edit:
    def edit(sidecar: Sidecar) -> None:
        tensor = sidecar.tensor(f"blk.0.{name}")
        tensor.dims = list(reversed(shape))
        n = 1
        for size in shape:
            n *= size
        tensor.data = values(name, n, tensor.type)

    return edit
