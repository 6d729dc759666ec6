"""The keys of a sidecar by name, each checked for being there and for its type; and what no key may say."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from gguf import GGUFValueType

from llamamem.errors import LlamamemError
from llamamem.formats.findings import quoted
from llamamem.formats.gguf_file import GgufField
from llamamem.formats.json_text import parse_json
from llamamem.formats.sidecar.layout import (
    DELTA_RULE,
    FOR_PEOPLE,
    FOR_PEOPLE_3,
    HEADS,
    HF_ROWS,
    MEMORY_KINDS,
    NORM_ROWS,
    PREFIX,
    PREFIX_3,
    SCHEMA,
    SCHEMA_3,
    SOURCE_PREFIXES,
    TYPES,
    TYPES_3,
)

MAX_LAYERS = 4096
MAX_WIDTH = 1 << 20


class Keys:
    """The keys of a file; every getter checks that the key is there, and its type, first."""

    def __init__(self, fields: Mapping[str, GgufField], is_3: bool) -> None:
        self.fields = fields
        self.prefix = PREFIX_3 if is_3 else PREFIX
        self.for_people = FOR_PEOPLE_3 if is_3 else FOR_PEOPLE
        self.types: Mapping[str, GGUFValueType] = TYPES_3[DELTA_RULE] if is_3 else TYPES  # until the kind is known

    def has(self, key: str) -> bool:
        return self.prefix + key in self.fields

    def get(self, key: str) -> Any:
        found = self.fields.get(self.prefix + key)
        if found is None:
            raise LlamamemError(f"{self.named(key)} is missing", reason="key-missing")
        if found.type != self.types[key]:
            text = f"{self.named(key)} has type {found.type.name}, must be {self.types[key].name}"
            raise LlamamemError(text, reason="key-type")
        return found.value

    def expect(self, key: str, want: str, reason: str = "unsupported") -> None:
        if (value := self.get(key)) != want:
            text = f"{self.named(key)} is {quoted(value)}, but only '{want}' is implemented"
            raise LlamamemError(text, reason=reason)

    def choice(self, key: str, allowed: tuple[str, ...]) -> str:
        value: str = self.get(key)
        if value not in allowed:
            text = f"{self.named(key)} is {quoted(value)}, but only {' and '.join(allowed)} are implemented"
            raise LlamamemError(text, reason="unsupported")
        return value

    def json(self, key: str, kind: type) -> Any:
        value = parse_json(self.named(key), self.get(key))
        if not isinstance(value, kind):
            name = "an object" if kind is dict else "a list"
            raise LlamamemError(f"{self.named(key)} must be {name} in JSON", reason="json-type")
        return value

    def named(self, key: str) -> str:
        """The key in a message."""
        return f"key '{self.prefix}{key}'"

    def bad(self, key: str, text: str, reason: str = "key-value") -> LlamamemError:
        return LlamamemError(f"{self.named(key)} {text}", reason=reason)


def expect_schema(keys: Keys, version: int) -> None:
    """The schema of the format version."""
    keys.expect("schema", f"{SCHEMA_3 if version == 3 else SCHEMA}.v{version}", "schema")


def memory_kind(keys: Keys) -> str:
    """The kind of memory; the keys of a file of version 3 depend on it."""
    kind = keys.choice("kind", MEMORY_KINDS)
    keys.types = TYPES_3[kind]
    return kind


def semantics(keys: Keys, version: int) -> int:
    """The version of the RWKV-MS's semantics."""
    key = "rwkv_ms_semantics_version"
    if version == 1 and not keys.has(key):
        return 1
    value: int = keys.get(key)
    if not 1 <= value <= min(version, 2):
        known = "1" if version == 1 else "1 or 2"
        raise keys.bad(key, f"is {value}, must be {known} in version {version} of the format", "semantics-version")
    return value


def base_arch(keys: Keys) -> str:
    """llama.cpp's name of the base's architecture."""
    value: str = keys.get("base_architecture")
    if not re.fullmatch("[a-z0-9][a-z0-9._-]{0,62}", value):
        raise keys.bad("base_architecture", f"is {quoted(value)}, must be a name as llama.cpp gives it")
    return value


def source_prefix(keys: Keys) -> str:
    """What the names of a checkpoint's tensors begin with."""
    return keys.choice("source_prefix", SOURCE_PREFIXES)


def rope_head_dim(keys: Keys) -> int:
    """The width of the heads whose rows are permuted; 0 where none are."""
    order, key = keys.choice("qk_row_order", (HF_ROWS, NORM_ROWS)), "rope_head_dim"
    if order == HF_ROWS:
        if keys.has(key):
            raise keys.bad(key, f"is there, but qk_row_order is {HF_ROWS}: no rows are permuted")
        return 0
    value: int = keys.get(key)
    if value % 2 or not 2 <= value <= MAX_WIDTH:
        raise keys.bad(key, f"is {value}, must be an even number from 2 to {MAX_WIDTH}")
    return value


def base_sha256(keys: Keys) -> str:
    """The base's SHA-256, in lower case."""
    value: str = keys.get("base_gguf_sha256")
    if not re.fullmatch("[0-9a-fA-F]{64}", value):
        raise keys.bad("base_gguf_sha256", f"is {quoted(value)}, must be 64 hex digits")
    return value.lower()


def alpha(keys: Keys) -> float:
    value: float = keys.get("alpha")
    if not math.isfinite(value):
        raise keys.bad("alpha", f"is {value}, must be finite")
    return value


def delta_heads(keys: Keys, least: int) -> list[str]:
    heads: list[str] = keys.json("delta_heads_json", list)
    if not least <= len(heads) <= len(HEADS) or any(heads.count(h) > 1 or h not in HEADS for h in heads):
        raise keys.bad("delta_heads_json", f"must name {least or 'none'} or more of {' '.join(HEADS)}, each once")
    return heads


def target_layers(keys: Keys) -> list[int]:
    targets: list[int] = keys.json("target_layers_json", list)
    whole = bool(targets) and all(type(t) is int and 0 <= t < MAX_LAYERS for t in targets)
    if not whole or any(a >= b for a, b in pairwise(targets)):
        raise keys.bad("target_layers_json", f"must be an ascending list of layers from 0 to {MAX_LAYERS - 1}")
    return targets
