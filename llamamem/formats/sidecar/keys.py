"""What the keys of a sidecar say, checked in the order of docs/sidecar.md, stage 2."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from llamamem.errors import LlamamemError
from llamamem.formats.base import FULL, SLIDING, AttentionLayer
from llamamem.formats.findings import Findings, quoted
from llamamem.formats.gguf_file import GgufField
from llamamem.formats.json_text import parse_json
from llamamem.formats.sidecar import config as cfg
from llamamem.formats.sidecar.layout import FOR_PEOPLE, HEADS, NAME_FORMAT, PREFIX, SCHEMA, TYPES

_CONFIG = "config_json"
_MODES = {"memory_backend": "rwkv_ms", "memory_readout_mode": "delta", "rwkv_ms_boundary_mode": "fixed_chunk"}
_MAX_PERIOD = 1 << 24  # chunk * states: the runtime keeps the counter modulo this in fp32
_MAX_STATE = 1 << 24  # values of one layer's state
_MAX_WIDTH = 1 << 20
_MAX_LAYERS = 4096
_SIZES = {"rank": 256, "num_state_heads": 64, "rwkv_ms_num_states": 1024, "rwkv_ms_chunk_size": _MAX_PERIOD}


@dataclass
class Said:
    """What the keys say, each None where it was refused or depends on what was.

    `layers` maps the target layers to their attention; `counts` are the file's three, by key.
    """

    format_version: Any
    semantics: Any = None
    base_sha256: Any = None
    config: Any = None
    sizes: dict[str, int] = field(default_factory=dict)  # rank, num_state_heads, ... by key
    alpha: Any = None
    erase_gate: Any = None
    update_mode: Any = None
    couple_lambda: Any = None
    rankwise_gates: Any = None
    delta_heads: list[str] | None = None
    layers: dict[int, AttentionLayer | None] | None = None
    counts: dict[str, int] = field(default_factory=dict)
    manifest: list[Any] | None = None


def read_keys(fields: Mapping[str, GgufField], faults: Findings) -> Said | None:
    """Reads and checks the keys; None if the file is of a version of which nothing else is known."""
    keys, ask = _Keys(fields), faults.attempt
    version = ask(keys.get, "format_version")
    if version not in (None, 1, 2):
        text = f"key '{PREFIX}format_version' is {version}; 1 and 2 are known, so it needs a newer version"
        faults.add(LlamamemError(text, reason="format-version"))
        return None
    said = Said(version)
    if version is not None:
        ask(keys.expect, "schema", f"{SCHEMA}.v{version}", "schema")
        said.semantics = ask(_semantics, keys, version)
    if keys.has("rwkv_ms_state_dtype"):
        ask(keys.expect, "rwkv_ms_state_dtype", "f32")
    for key in fields:
        name = key.removeprefix(PREFIX) if key.startswith(PREFIX) else None
        if name in FOR_PEOPLE:
            ask(keys.get, name)
        elif name not in TYPES and not key.startswith("general."):
            text = f"unknown key {quoted(key)}: it may change the maths, so it needs a newer version"
            faults.add(LlamamemError(text, reason="key-unknown"))
    ask(keys.expect, "tensor_name_format", NAME_FORMAT)
    said.base_sha256 = ask(_base_sha256, keys)
    said.config = ask(keys.json, _CONFIG, dict)
    if said.config is not None:
        for fault in cfg.config_faults(_CONFIG, said.config):
            faults.add(fault)
    _read_sizes(keys, said, faults)
    _read_layers(keys, said, faults)
    for key in ("tensor_count", "total_numel", "total_bytes"):
        count = ask(keys.get, key)
        if count is not None:
            said.counts[key] = count
    said.manifest = ask(keys.json, "tensor_manifest_json", list)
    return said


def _read_sizes(keys: _Keys, said: Said, faults: Findings) -> None:
    """From the modes to the members that no key repeats."""
    ask = faults.attempt

    def member(check: Any, *args: Any) -> Any:
        return None if said.config is None else ask(check, _CONFIG, said.config, *args)

    for key, want in _MODES.items():
        ask(keys.expect, key, want)
        member(cfg.choice, key, (want,))
    if said.config is not None and said.semantics is not None:
        ask(_agree_semantics, said.config, said.semantics)
    if said.config is not None and "rwkv_ms_state_dtype" in said.config:
        member(cfg.choice, "rwkv_ms_state_dtype", ("f32",))
    for key, high in _SIZES.items():
        in_config, in_file = member(cfg.integer, key, 1, high), ask(keys.get, key)
        if in_config is not None and in_file is not None and ask(_agree, key, in_file, in_config):
            said.sizes[key] = in_file
    if len(said.sizes) == len(_SIZES):
        ask(_check_products, said.sizes)
    said.alpha, in_config = ask(_alpha, keys), member(cfg.number, "alpha")
    if said.alpha is not None and in_config is not None:
        ask(_agree, "alpha", said.alpha, float(np.float32(in_config)))
    said.erase_gate = member(cfg.number, "rwkv_ms_erase_gate")
    said.update_mode = member(cfg.choice, "state_update_mode", cfg.UPDATE_MODES)
    said.couple_lambda = member(cfg.boolean, "couple_lambda")
    said.rankwise_gates = member(cfg.boolean, "rankwise_gates")


def _read_layers(keys: _Keys, said: Said, faults: Findings) -> None:
    ask = faults.attempt
    said.delta_heads = ask(_delta_heads, keys)
    if said.config is not None:
        ask(_agree_list, said.config, "delta_heads", said.delta_heads)
    targets = ask(_target_layers, keys)
    if said.config is not None:
        ask(_agree_list, said.config, "target_layers", targets)
    entries = ask(keys.json, "per_layer_attention_json", list)
    if targets is None:
        return
    said.layers = dict.fromkeys(targets)
    if entries is None:
        return
    if len(entries) != len(targets):
        text = f"key '{PREFIX}per_layer_attention_json' has {len(entries)} entries for {len(targets)} target layers"
        faults.add(LlamamemError(text, reason="disagree"))
        return
    for target, entry in zip(targets, entries, strict=True):
        said.layers[target] = ask(_attention, target, entry, said.delta_heads)


def _semantics(keys: _Keys, version: int) -> int:
    key = "rwkv_ms_semantics_version"
    if version == 1 and not keys.has(key):
        return 1
    value: int = keys.get(key)
    if not 1 <= value <= version:
        known = "1" if version == 1 else "1 or 2"
        text = f"key '{PREFIX}{key}' is {value}, must be {known} in version {version} of the format"
        raise LlamamemError(text, reason="semantics-version")
    return value


def _base_sha256(keys: _Keys) -> str:
    value: str = keys.get("base_gguf_sha256")
    if not re.fullmatch("[0-9a-fA-F]{64}", value):
        text = f"key '{PREFIX}base_gguf_sha256' is {quoted(value)}, must be 64 hex digits"
        raise LlamamemError(text, reason="key-value")
    return value.lower()


def _alpha(keys: _Keys) -> float:
    value: float = keys.get("alpha")
    if not math.isfinite(value):
        raise LlamamemError(f"key '{PREFIX}alpha' is {value}, must be finite", reason="key-value")
    return value


def _agree(key: str, in_file: float, in_config: float) -> bool:
    if in_file != in_config:
        text = f"key '{PREFIX}{key}' is {in_file}, but {_CONFIG} has {key} {in_config}"
        raise LlamamemError(text, reason="disagree")
    return True


def _agree_semantics(config: dict[str, Any], in_file: int) -> None:
    """A config without the member means semantics 1."""
    key = "rwkv_ms_semantics_version"
    _agree(key, in_file, cfg.integer(_CONFIG, {key: 1} | config, key, 1, 2))


def _agree_list(config: dict[str, Any], key: str, in_file: list[Any] | None) -> None:
    if key not in config:
        raise LlamamemError(f"{_CONFIG}: {key} is missing", reason="config-missing")
    if in_file is not None and not cfg.same(config[key], in_file):
        raise LlamamemError(f"key '{PREFIX}{key}_json' and {_CONFIG}: {key} differ", reason="disagree")


def _check_products(size: dict[str, int]) -> None:
    rank, heads, states, chunk = (size[key] for key in _SIZES)
    if chunk * states > _MAX_PERIOD:
        text = f"{_CONFIG}: rwkv_ms_chunk_size * rwkv_ms_num_states is {chunk * states}, at most {_MAX_PERIOD} works"
        raise LlamamemError(text, reason="config-value")
    if heads * states * rank**2 > _MAX_STATE:
        text = f"{_CONFIG}: rank, num_state_heads and rwkv_ms_num_states give a state of over {_MAX_STATE} values"
        raise LlamamemError(text, reason="config-value")


def _delta_heads(keys: _Keys) -> list[str]:
    heads: list[str] = keys.json("delta_heads_json", list)
    if not 1 <= len(heads) <= len(HEADS) or any(heads.count(h) > 1 or h not in HEADS for h in heads):
        text = f"key '{PREFIX}delta_heads_json' must name one or more of {' '.join(HEADS)}, each once"
        raise LlamamemError(text, reason="key-value")
    return heads


def _target_layers(keys: _Keys) -> list[int]:
    targets: list[int] = keys.json("target_layers_json", list)
    whole = bool(targets) and all(type(t) is int and 0 <= t < _MAX_LAYERS for t in targets)
    if not whole or any(a >= b for a, b in pairwise(targets)):
        text = f"key '{PREFIX}target_layers_json' must be an ascending list of layers from 0 to {_MAX_LAYERS - 1}"
        raise LlamamemError(text, reason="key-value")
    return targets


def _attention(target: int, entry: Any, delta_heads: list[str] | None) -> AttentionLayer:
    try:
        return _attention_layer(f"per_layer_attention_json: layer {target}", target, entry, delta_heads)
    except LlamamemError as e:
        raise LlamamemError(str(e), reason="attention") from None


def _attention_layer(where: str, target: int, entry: Any, delta_heads: list[str] | None) -> AttentionLayer:
    if not isinstance(entry, dict):
        raise LlamamemError(f"{where}: its entry is no object")
    if cfg.integer(where, entry, "layer", 0, _MAX_LAYERS - 1) != target:
        raise LlamamemError(f"{where}: its entry is of layer {entry['layer']}")
    kind = cfg.choice(where, entry, "attention_kind", (SLIDING, FULL, "sliding", "full"))
    width = {
        head: None if entry.get(f"{head}_out") is None else cfg.integer(where, entry, f"{head}_out", 0, _MAX_WIDTH)
        for head in HEADS
    }
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


class _Keys:
    """The keys of a file; every getter checks that the key is there, and its type, first."""

    def __init__(self, fields: Mapping[str, GgufField]) -> None:
        self._fields = fields

    def has(self, key: str) -> bool:
        return PREFIX + key in self._fields

    def get(self, key: str) -> Any:
        found = self._fields.get(PREFIX + key)
        if found is None:
            raise LlamamemError(f"key '{PREFIX}{key}' is missing", reason="key-missing")
        if found.type != TYPES[key]:
            text = f"key '{PREFIX}{key}' has type {found.type.name}, must be {TYPES[key].name}"
            raise LlamamemError(text, reason="key-type")
        return found.value

    def expect(self, key: str, want: str, reason: str = "unsupported") -> None:
        if (value := self.get(key)) != want:
            text = f"key '{PREFIX}{key}' is {quoted(value)}, but only '{want}' is implemented"
            raise LlamamemError(text, reason=reason)

    def json(self, key: str, kind: type) -> Any:
        value = parse_json(f"key '{PREFIX}{key}'", self.get(key))
        if not isinstance(value, kind):
            name = "an object" if kind is dict else "a list"
            raise LlamamemError(f"key '{PREFIX}{key}' must be {name} in JSON", reason="json-type")
        return value
