"""The order of the rows of delta_q and delta_k: a checkpoint's, or that of a base whose rope is over neighbours.

A converter to GGUF reorders the rows of q and k of such a base within each head of width d: row j d/2 + i, where j is
0 or 1, becomes row 2 i + j. What is added to their products has to lie the same way.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from llamamem.formats.gguf_file import TYPE_SIZE, GgufTensor

PERMUTED = ("delta_q", "delta_k")  # v and o have no rope


def to_norm(tensor: GgufTensor, head_dim: int) -> GgufTensor:
    """A tensor [width, D] in the checkpoint's order as one in the base's; `width` is a multiple of `head_dim`."""
    return _reordered(tensor, (-1, 2, head_dim // 2))


def to_hf(tensor: GgufTensor, head_dim: int) -> GgufTensor:
    """The way back."""
    return _reordered(tensor, (-1, head_dim // 2, 2))


def _reordered(tensor: GgufTensor, split: tuple[int, int, int]) -> GgufTensor:
    raw = np.frombuffer(tensor.data, f"<u{TYPE_SIZE[tensor.dtype]}")
    return replace(tensor, data=raw.reshape(*split, tensor.shape[-1]).swapaxes(1, 2).tobytes())
