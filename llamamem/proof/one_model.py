"""Whether two GGUF files are roundings of one model: told from every weight, not from names or figures.

What a memory learnt on one of them means the same on the other as far as the other's rounding lets it. So the question
is not whether the files have one origin but whether any weight differs by more than the two roundings explain. A
fine-tune that moved the weights by less is taken for the model itself, and a memory is as good on it as on another
rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize

from llamamem.errors import LlamamemError
from llamamem.formats.base import base_indexes
from llamamem.formats.gguf_file import GgufIndex, GgufTensorInfo, read_gguf_index

__all__ = ["OneModel", "check_one_model"]

_BLOCK = 32  # weights; every format's scale is that of so many, or of fewer
_CHUNK = 1 << 22  # weights that are looked at together

# Root mean square of what a rounding changes, a part of that of the largest weights of its blocks of 32. Measured with
# llama.cpp's own quantisers on normal, Laplace, uniform and t-distributed weights, with strong importance weights and
# without: the largest of them. tests/native/test_one_model.py measures again.
_ROUNDING = {
    "F32": 0.0,
    "Q8_0": 0.0023,
    "Q6_K": 0.0086,
    "Q5_K": 0.0173,
    "Q5_0": 0.0186,
    "Q5_1": 0.0176,
    "Q4_K": 0.0350,
    "Q4_0": 0.0390,
    "Q4_1": 0.0365,
    "IQ4_NL": 0.0410,
    "IQ4_XS": 0.0410,
    "Q3_K": 0.0780,
    "Q2_K": 0.1490,
}
_FLOAT = {"F16": 2.0**-11, "BF16": 2.0**-8}  # most that a weight changes, a part of itself
_SUBNORMAL = 2.0**-24  # of F16, half its smallest step: 2^-25, rounded up


@dataclass(frozen=True)
class OneModel:
    """`most` is the largest difference of a tensor, a part of what the two roundings may make; `tensor` has it."""

    n_tensors: int
    most: float
    tensor: str


def check_one_model(a: str | Path, b: str | Path, progress: Callable[[int], None] | None = None) -> OneModel:
    """Compares two bases weight by weight; `progress` is told the bytes of both that were read.

    Raises LlamamemError that names the first tensor, key or type for which they are not, or cannot be seen to be.
    """
    one, other = _Base(Path(a)), _Base(Path(b))
    arch = one.index.get("general.architecture")
    for key in sorted({*one.index.fields, *other.index.fields}):
        if key == "general.architecture" or key.startswith((f"{arch}.", "tokenizer.ggml.")):
            x, y = one.index.get(key), other.index.get(key)
            if x != y and not key.startswith("tokenizer.ggml.add_"):
                raise _differ(one, other, f"key '{key}' is {_short(x)} in one and {_short(y)} in the other")
    if names := sorted(one.tensors.keys() ^ other.tensors.keys()):
        raise _differ(one, other, f"tensor '{names[0]}' is in one of them alone")
    found = OneModel(len(one.tensors), 0.0, "")
    for name in one.tensors:
        ratio = _ratio(name, one, other, progress)
        if ratio > 1:
            text = f"tensor '{name}' differs by {ratio:.3g} times what rounding explains"
            raise _differ(one, other, f"{text}; its memories would mean something else there")
        if ratio >= found.most:
            found = OneModel(len(one.tensors), ratio, name)
    return found


class _Base:
    """The tensors of a base, in one file or several."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.index = read_gguf_index(path)
        self.tensors: dict[str, tuple[GgufIndex, GgufTensorInfo]] = {
            info.name: (part, info) for part in base_indexes(self.index) for info in part.tensors
        }

    def chunks(self, name: str) -> Iterator[tuple[np.ndarray, int]]:
        """The weights of a tensor as f32, some rows after the other, and how many bytes they are in the file."""
        part, info = self.tensors[name]
        per_block, n_bytes = GGML_QUANT_SIZES[info.type]
        row = info.shape[-1] if info.shape else 1
        rows = prod(info.shape) // row
        row_bytes = row // per_block * n_bytes
        try:
            raw = np.memmap(part.path, np.uint8, "r", part.data_start + info.offset, (rows, row_bytes))
        except (OSError, ValueError) as e:
            raise LlamamemError(f"{part.path}: tensor '{name}' cannot be read ({e}); fetch the file again") from None
        step = max(1, _CHUNK // row)
        for start in range(0, rows, step):
            piece = np.ascontiguousarray(raw[start : start + step])
            yield dequantize(piece, info.type), piece.nbytes


def _ratio(name: str, one: _Base, other: _Base, progress: Callable[[int], None] | None) -> float:
    """The difference of a tensor on both sides, a part of what rounding may make: 0 the same, over 1 too much."""
    x, y = one.tensors[name][1], other.tensors[name][1]
    if x.shape != y.shape:
        raise _differ(one, other, f"tensor '{name}' has shape {list(x.shape)} in one and {list(y.shape)} in the other")
    for base, info in ((one, x), (other, y)):
        if info.type.name not in {**_ROUNDING, **_FLOAT}:
            raise LlamamemError(
                f"{base.path}: tensor '{name}' is {info.type.name}, too coarse to tell what it was made of"
            )
    n, blocks, difference, largest_x, largest_y, floats = 0, 0, 0.0, 0.0, 0.0, 0.0
    for (a, n_a), (b, n_b) in zip(one.chunks(name), other.chunks(name), strict=True):
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise _differ(one, other, f"tensor '{name}' has a value that is not a number")
        n += a.size
        difference += _squares(a - b)
        of_a, of_b = _largest(a), _largest(b)
        blocks += of_a.size
        largest_x += _squares(of_a)
        largest_y += _squares(of_b)
        for info, values in ((x, a), (y, b)):
            if part := _FLOAT.get(info.type.name):
                floats += _squares(np.abs(values) * part + _SUBNORMAL)
        if progress is not None:
            progress(n_a + n_b)
    # the larger of both sides: a rounding may lose the largest weight of a block
    largest = np.sqrt(max(largest_x, largest_y) / blocks)
    rounded = sum(_ROUNDING.get(info.type.name, 0.0) for info in (x, y)) * largest + np.sqrt(floats / n)
    apart = np.sqrt(difference / n)
    if apart == 0:
        return 0.0
    return float(apart / rounded) if rounded > 0 else float("inf")


def _largest(values: np.ndarray) -> np.ndarray:
    """The largest magnitude of each block; a tensor that is no whole number of them is looked at as one."""
    flat = np.abs(values).reshape(-1)
    return flat.reshape(-1, _BLOCK).max(axis=1) if flat.size % _BLOCK == 0 else flat.max(keepdims=True)


def _squares(values: np.ndarray) -> float:
    return float((values.astype(np.float64) ** 2).sum())


def _differ(one: _Base, other: _Base, text: str) -> LlamamemError:
    return LlamamemError(f"{one.path} and {other.path} are not one model: {text}", reason="base-other")


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


assert set(_ROUNDING) | set(_FLOAT) <= {t.name for t in GGMLQuantizationType}
