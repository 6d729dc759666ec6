"""What the keys of a sidecar say, checked in the order of docs/sidecar.md, stage 2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llamamem.errors import LlamamemError
from llamamem.formats.base import FULL, SLIDING, AttentionLayer
from llamamem.formats.findings import Findings, quoted
from llamamem.formats.gguf_file import GgufField
from llamamem.formats.sidecar import config as cfg
from llamamem.formats.sidecar import fields as of
from llamamem.formats.sidecar.fields import MAX_LAYERS, MAX_WIDTH, Keys
from llamamem.formats.sidecar.layout import ARCHITECTURE_3, DELTA_RULE, HEADS, NAME_FORMAT, RWKV_MS, SOURCE_PREFIX

_CONFIG = "config_json"
_MAX_PERIOD = 1 << 24  # chunk * states: the runtime keeps the counter modulo this in fp32
_MAX_STATE = 1 << 24  # values of one layer's state
_SIZES = {
    DELTA_RULE: {"rank": 256, "num_state_heads": 64},
    RWKV_MS: {"rank": 256, "num_state_heads": 64, "rwkv_ms_num_states": 1024, "rwkv_ms_chunk_size": _MAX_PERIOD},
}


@dataclass
class Said:
    """What the keys say, each None where it was refused or depends on what was.

    `layers` maps the target layers to their attention; `counts` are the file's three, by key.
    """

    is_3: bool
    format_version: Any
    kind: str = RWKV_MS
    base_arch: Any = "gemma4"
    source_prefix: Any = SOURCE_PREFIX
    rope_head_dim: Any = 0  # 0: rows of q and k as in the checkpoint
    semantics: Any = None
    base_sha256: Any = None
    config: Any = None  # as in the file
    sizes: dict[str, int] = field(default_factory=dict)  # rank, num_state_heads, ... by key
    alpha: Any = None
    erase_gate: Any = None
    update_mode: Any = None
    couple_lambda: Any = None
    rankwise_gates: Any = None
    normalize_qk: Any = True
    o_norm: Any = False
    o_norm_eps: Any = None
    scaled: Any = False
    scale_max: Any = None
    scale_granularity: Any = None
    delta_heads: list[str] | None = None
    layers: dict[int, AttentionLayer | None] | None = None
    every_layer: bool = False  # the config's empty list: the targets are all layers of the base
    counts: dict[str, int] = field(default_factory=dict)
    manifest: list[Any] | None = None


def read_keys(fields: Mapping[str, GgufField], faults: Findings) -> Said | None:
    """Reads and checks the keys; None if the file is of a version or kind of which nothing else is known."""
    is_3 = fields["general.architecture"].value == ARCHITECTURE_3
    keys, ask = Keys(fields, is_3), faults.attempt
    version = ask(keys.get, "format_version")
    known = (3,) if is_3 else (1, 2)
    if version not in (None, *known):
        text = f"is {version}; {' and '.join(map(str, known))} are known, so it needs a newer version"
        faults.add(keys.bad("format_version", text.replace("3 are", "3 is"), "format-version"))
        return None
    said = Said(is_3, version)
    if version is not None:
        ask(of.expect_schema, keys, version)
    if is_3:
        kind = ask(of.memory_kind, keys)
        if kind is None:
            return None
        said.kind = kind
    if said.kind == RWKV_MS:
        if version is not None:
            said.semantics = ask(of.semantics, keys, version)
        if keys.has("rwkv_ms_state_dtype"):
            ask(keys.expect, "rwkv_ms_state_dtype", "f32")
    for key in fields:
        name = key.removeprefix(keys.prefix) if key.startswith(keys.prefix) else None
        if name is not None and name in keys.for_people:
            ask(keys.get, name)
        elif name not in keys.types and not key.startswith("general."):
            text = f"unknown key {quoted(key)}: it may change the maths, so it needs a newer version"
            faults.add(LlamamemError(text, reason="key-unknown"))
    if is_3:
        said.base_arch = ask(of.base_arch, keys)
        said.source_prefix = ask(of.source_prefix, keys)
        said.rope_head_dim = ask(of.rope_head_dim, keys)
    ask(keys.expect, "tensor_name_format", NAME_FORMAT)
    said.base_sha256 = ask(of.base_sha256, keys)
    said.config = ask(keys.json, _CONFIG, dict)
    if said.config is not None:
        for fault in cfg.config_faults(_CONFIG, said.config, said.kind):
            faults.add(fault)
    _read_sizes(keys, said, faults)
    _read_layers(keys, said, faults)
    for key in ("tensor_count", "total_numel", "total_bytes"):
        count = ask(keys.get, key)
        if count is not None:
            said.counts[key] = count
    said.manifest = ask(keys.json, "tensor_manifest_json", list)
    return said


def _read_sizes(keys: Keys, said: Said, faults: Findings) -> None:
    """From the modes to the members that no key repeats."""
    ask = faults.attempt
    config = None if said.config is None else cfg.with_defaults(said.config, said.kind)
    is_rwkv_ms = said.kind == RWKV_MS

    def member(check: Any, *args: Any) -> Any:
        return None if config is None else ask(check, _CONFIG, config, *args)

    if not said.is_3:
        ask(keys.expect, "memory_backend", RWKV_MS)
    member(cfg.choice, "memory_backend", (said.kind,))
    for key, want in (("memory_readout_mode", "delta"), ("rwkv_ms_boundary_mode", "fixed_chunk"))[: 1 + is_rwkv_ms]:
        ask(keys.expect, key, want)
        member(cfg.choice, key, (want,))
    if is_rwkv_ms and config is not None:
        if said.semantics is not None:
            ask(_agree_semantics, keys, config, said.semantics)
        if "rwkv_ms_state_dtype" in config:
            member(cfg.choice, "rwkv_ms_state_dtype", ("f32",))
    for key, high in _SIZES[said.kind].items():
        in_config, in_file = member(cfg.integer, key, 1, high), ask(keys.get, key)
        if in_config is not None and in_file is not None and ask(_agree, keys, key, in_file, in_config):
            said.sizes[key] = in_file
    if is_rwkv_ms and len(said.sizes) == len(_SIZES[RWKV_MS]):
        ask(_check_products, said.sizes)
    said.alpha, in_config = ask(of.alpha, keys), member(cfg.number, "alpha")
    if said.alpha is not None and in_config is not None:
        ask(_agree, keys, "alpha", said.alpha, float(np.float32(in_config)))
    if is_rwkv_ms:
        said.erase_gate = member(cfg.number, "rwkv_ms_erase_gate")
    said.update_mode = member(cfg.choice, "state_update_mode", cfg.UPDATE_MODES)
    said.couple_lambda = member(cfg.boolean, "couple_lambda")
    said.rankwise_gates = member(cfg.boolean, "rankwise_gates")
    if not is_rwkv_ms:
        said.normalize_qk = member(cfg.boolean, "normalize_qk")
        said.o_norm = member(cfg.boolean, "delta_o_rmsnorm")
        said.o_norm_eps = member(cfg.not_negative, "delta_o_rmsnorm_eps")
        said.scaled = member(cfg.boolean, "trainable_delta_scale")
        said.scale_max = member(cfg.number, "delta_scale_max")
        said.scale_granularity = member(cfg.choice, "delta_scale_granularity", ("layer", "head"))


def _read_layers(keys: Keys, said: Said, faults: Findings) -> None:
    ask = faults.attempt
    config = None if said.config is None else cfg.with_defaults(said.config, said.kind)
    said.delta_heads = ask(of.delta_heads, keys, 0 if said.kind == DELTA_RULE else 1)
    if config is not None:
        ask(_agree_list, keys, config, "delta_heads", said.delta_heads)
    targets = ask(of.target_layers, keys)
    if config is not None:
        said.every_layer = said.is_3 and config.get("target_layers") == []
        if said.every_layer and targets is not None:
            ask(_check_every_layer, keys, targets)
        else:
            ask(_agree_list, keys, config, "target_layers", targets)
    entries = ask(keys.json, "per_layer_attention_json", list)
    if targets is None:
        return
    said.layers = dict.fromkeys(targets)
    if entries is None:
        return
    if len(entries) != len(targets):
        text = f"has {len(entries)} entries for {len(targets)} target layers"
        faults.add(keys.bad("per_layer_attention_json", text, "disagree"))
        return
    for target, entry in zip(targets, entries, strict=True):
        said.layers[target] = ask(_attention, target, entry, said.delta_heads, said.rope_head_dim or 1)


def _agree(keys: Keys, key: str, in_file: float, in_config: float) -> bool:
    if in_file != in_config:
        raise keys.bad(key, f"is {in_file}, but {_CONFIG} has {key} {in_config}", "disagree")
    return True


def _agree_semantics(keys: Keys, config: dict[str, Any], in_file: int) -> None:
    """A config without the member means semantics 1."""
    key = "rwkv_ms_semantics_version"
    _agree(keys, key, in_file, cfg.integer(_CONFIG, {key: 1} | config, key, 1, 2))


def _agree_list(keys: Keys, config: dict[str, Any], key: str, in_file: list[Any] | None) -> None:
    if key not in config:
        raise LlamamemError(f"{_CONFIG}: {key} is missing", reason="config-missing")
    if in_file is not None and not cfg.same(config[key], in_file):
        raise LlamamemError(f"{keys.named(f'{key}_json')} and {_CONFIG}: {key} differ", reason="disagree")


def _check_every_layer(keys: Keys, targets: list[int]) -> None:
    if targets != list(range(len(targets))):
        raise keys.bad(
            "target_layers_json", f"leaves layers out, but {_CONFIG}: target_layers is empty: all", "disagree"
        )


def _check_products(size: dict[str, int]) -> None:
    rank, heads, states, chunk = (size[key] for key in _SIZES[RWKV_MS])
    if chunk * states > _MAX_PERIOD:
        text = f"{_CONFIG}: rwkv_ms_chunk_size * rwkv_ms_num_states is {chunk * states}, at most {_MAX_PERIOD} works"
        raise LlamamemError(text, reason="config-value")
    if heads * states * rank**2 > _MAX_STATE:
        text = f"{_CONFIG}: rank, num_state_heads and rwkv_ms_num_states give a state of over {_MAX_STATE} values"
        raise LlamamemError(text, reason="config-value")


def _attention(target: int, entry: Any, delta_heads: list[str] | None, step: int) -> AttentionLayer:
    """`step` is what the widths of q and k must be multiples of."""
    try:
        return _attention_layer(f"per_layer_attention_json: layer {target}", target, entry, delta_heads, step)
    except LlamamemError as e:
        raise LlamamemError(str(e), reason="attention") from None


def _attention_layer(where: str, target: int, entry: Any, delta_heads: list[str] | None, step: int) -> AttentionLayer:
    if not isinstance(entry, dict):
        raise LlamamemError(f"{where}: its entry is no object")
    if cfg.integer(where, entry, "layer", 0, MAX_LAYERS - 1) != target:
        raise LlamamemError(f"{where}: its entry is of layer {entry['layer']}")
    kind = cfg.choice(where, entry, "attention_kind", (SLIDING, FULL, "sliding", "full"))
    width = {
        head: None if entry.get(f"{head}_out") is None else cfg.integer(where, entry, f"{head}_out", 0, MAX_WIDTH)
        for head in HEADS
    }
    for head in "qk":
        if (width[head] or 0) % step:
            raise LlamamemError(f"{where}: {head}_out is {width[head]}, no multiple of rope_head_dim {step}")
    if delta_heads is not None:
        for head in delta_heads:
            if not width[head]:
                raise LlamamemError(f"{where}: {head}_out is missing, but delta head {head} is active")
        active = entry.get("active_delta_heads", delta_heads)
        if not isinstance(active, list) or len(active) != len(delta_heads) or any(h not in active for h in delta_heads):
            raise LlamamemError(f"{where}: active_delta_heads are not those of delta_heads_json")
    return AttentionLayer(
        layer=target,
        attention_kind=SLIDING if kind.startswith("sliding") else FULL,
        q_out=width["q"] or 0,
        k_out=width["k"],
        v_out=width["v"],
        o_out=width["o"] or 0,
    )
