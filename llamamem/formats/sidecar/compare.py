"""Is it the same memory? Compares sidecars and checkpoint directories tensor by tensor and member by member."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llamamem.formats.checkpoint import read_checkpoint
from llamamem.formats.checkpoint.writer import checkpoint_tensors
from llamamem.formats.gguf_file import GgufTensor
from llamamem.formats.sidecar import read_sidecar, short_name, values
from llamamem.formats.sidecar.config import ABSENT, kind_of
from llamamem.formats.sidecar.layout import RWKV_MS, SOURCE_PREFIX, source_prefix


@dataclass(frozen=True)
class TensorDifference:
    """One tensor that is not the same on both sides; a shape and a type is None where it is not there.

    `max_abs_diff` is of the fp32 values: None where shapes differ, NaN where only one side is a number.
    """

    name: str
    shapes: tuple[tuple[int, ...] | None, tuple[int, ...] | None]
    types: tuple[str | None, str | None]
    bytes: tuple[int, int]
    max_abs_diff: float | None

    def __str__(self) -> str:
        for side, shape in zip("AB", reversed(self.shapes), strict=True):
            if shape is None:
                return f"only in {side}"
        if self.shapes[0] != self.shapes[1]:
            return f"shape {_dims(self.shapes[0])} and {_dims(self.shapes[1])}"
        types = "" if self.types[0] == self.types[1] else f"{self.types[0]} and {self.types[1]}: "
        if self.max_abs_diff == 0:
            return f"{types}other bytes, the same values"
        return f"{types}values differ by up to {self.max_abs_diff:.3g}"


@dataclass(frozen=True)
class ConfigDifference:
    """A member of the config; a value is JSON text, None where it is not there."""

    member: str
    a: str | None
    b: str | None

    def __str__(self) -> str:
        return f"{self.a or 'not there'} and {self.b or 'not there'}"


@dataclass(frozen=True)
class Comparison:
    """What differs, and how much was looked at; `bases` are the SHA-256 that sidecars are bound to."""

    a: Path
    b: Path
    compared: int  # tensors that are on both sides
    tensors: tuple[TensorDifference, ...]
    config: tuple[ConfigDifference, ...]
    bases: tuple[str | None, str | None]

    @property
    def same(self) -> bool:
        """Every tensor has the same name, shape, type and bytes, and every member of the config the same value."""
        return not self.tensors and not self.config

    def as_json(self) -> dict[str, Any]:
        """For machines: a NaN is the string "nan"."""
        tensors = [asdict(difference) for difference in self.tensors]
        for entry in tensors:
            entry["max_abs_diff"] = _json_number(entry["max_abs_diff"])
        return {
            "same": self.same,
            "a": str(self.a),
            "b": str(self.b),
            "tensors_compared": self.compared,
            "tensors": tensors,
            "config": [asdict(difference) for difference in self.config],
            "base_gguf_sha256": list(self.bases),
        }


def compare(a: str | Path, b: str | Path, *, config: str | None = None) -> Comparison:
    """Compares two sidecars, two checkpoint directories, or one of each; `config` as for read_checkpoint.

    Raises LlamamemError if one of them cannot be read or is damaged.
    """
    one, other = _Side.read(Path(a), config), _Side.read(Path(b), config)
    tensors = [
        difference
        for name in one.tensors | other.tensors
        if (difference := _tensor_difference(name, one.tensors.get(name), other.tensors.get(name)))
    ]
    members = [
        ConfigDifference(key, one.config.get(key), other.config.get(key))
        for key in one.config | other.config
        if one.config.get(key) != other.config.get(key)
    ]
    shared = len(one.tensors.keys() & other.tensors.keys())
    return Comparison(Path(a), Path(b), shared, tuple(tensors), tuple(members), (one.base, other.base))


@dataclass(frozen=True)
class _Side:
    tensors: dict[str, GgufTensor]  # by short name
    config: dict[str, str]  # values as JSON, which tells 1 from 1.0 and from true; what is absent has its meaning
    base: str | None

    @classmethod
    def read(cls, path: Path, config_name: str | None) -> _Side:
        config: Mapping[str, Any]
        if path.is_dir():
            checkpoint = read_checkpoint(path, config_name)
            tensors, config, base = checkpoint.tensors, checkpoint.config, None
        else:
            sidecar = read_sidecar(path)
            tensors, config, base = checkpoint_tensors(sidecar), sidecar.config, sidecar.base_sha256
        meant = ABSENT[kind_of(config) or RWKV_MS]
        texts = {key: json.dumps(value, sort_keys=True) for key, value in {**meant, **config}.items()}
        prefix = source_prefix(tensors) or SOURCE_PREFIX
        return cls({short_name(name, True, prefix): tensor for name, tensor in tensors.items()}, texts, base)


def _tensor_difference(name: str, a: GgufTensor | None, b: GgufTensor | None) -> TensorDifference | None:
    if a and b and (a.shape, a.dtype, a.data) == (b.shape, b.dtype, b.data):
        return None
    return TensorDifference(
        name,
        shapes=(a.shape if a else None, b.shape if b else None),
        types=(a.dtype if a else None, b.dtype if b else None),
        bytes=(len(a.data) if a else 0, len(b.data) if b else 0),
        max_abs_diff=_max_abs_diff(values(a), values(b)) if a and b and a.shape == b.shape else None,
    )


def _max_abs_diff(a: np.ndarray, b: np.ndarray) -> float:
    with np.errstate(invalid="ignore", over="ignore"):
        difference = np.abs(a.astype(np.float64) - b)
    difference[(a == b) | (np.isnan(a) & np.isnan(b))] = 0  # an infinity and itself, a NaN and another
    return float(difference.max(initial=0))


def _dims(shape: tuple[int, ...] | None) -> str:
    return str(list(shape or ()))


def _json_number(value: float | None) -> float | str | None:
    return value if value is None or np.isfinite(value) else str(value)
