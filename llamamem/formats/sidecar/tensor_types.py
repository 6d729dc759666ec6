"""Conversions between the types that a sidecar's tensors may have."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from llamamem.errors import LlamamemError
from llamamem.formats.gguf_file import GgufTensor
from llamamem.formats.sidecar import values


def convert(tensor: GgufTensor, dtype: str) -> GgufTensor:
    """The tensor as BF16 (rounded to the nearest, ties to even) or F32 (exact).

    Raises LlamamemError if a finite value would become infinite.
    """
    if tensor.dtype == dtype:
        return tensor
    exact = values(tensor)
    data = {"BF16": bf16, "F32": lambda array: array.astype("<f4").tobytes()}[dtype](exact)
    rounded = replace(tensor, dtype=dtype, data=data)
    lost = np.isfinite(exact) & ~np.isfinite(values(rounded))
    if lost.any():
        raise LlamamemError(f"tensor '{tensor.name}': {exact[lost][0]:g} is too large for {dtype}; use --dtype f32")
    return rounded


def bf16(array: np.ndarray) -> bytes:
    """Raw little-endian BF16 of fp32 values, rounded to the nearest, ties to even; a NaN stays one."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    quiet = (bits >> 16) | 0x40  # adding to a NaN could carry into the sign, cutting it could leave an infinity
    return np.where(np.isnan(array), quiet, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()
