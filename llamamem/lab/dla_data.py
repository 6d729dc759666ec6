"""The data of the DLA lab, drawn as the published figures were: segments with a theme, and needles among filler.

T tokens, d numbers each. What is drawn is rounded to fp32, as the published data were: where several tokens are worth
the same to a cache, that rounding decides. All arithmetic after it is in double precision.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np

WIDTH = 32  # d

F32 = np.float32

Sequence = tuple[np.ndarray, np.ndarray, list[int]]  # keys [T, d], values [T, d], where the needles are


class Draws:
    """What PyTorch's CPU generator draws from a seed, without PyTorch: the same MT19937, read in the same way."""

    def __init__(self, seed: int):
        self._words = np.random.RandomState(seed)

    def randn(self, n: int) -> np.ndarray:
        """n normal numbers in fp32; PyTorch's own as long as n is a multiple of 16, which it draws at a time."""
        u = self._raw(-(-n // 16) * 16).reshape(-1, 2, 8) % 2**24 / 2**24
        r, angle = np.sqrt(-2 * np.log(1 - u[:, 0])), 2 * np.pi * u[:, 1]
        return np.stack([r * np.cos(angle), r * np.sin(angle)], axis=1).ravel()[:n].astype(F32)

    def randint(self, low: int, high: int) -> int:
        """low <= number < high."""
        return low + int(self._raw(1)[0] % (high - low))

    def copy(self) -> Draws:
        """One that draws on from here."""
        return copy.deepcopy(self)

    def _raw(self, n: int) -> np.ndarray:
        return self._words.randint(0, 2**32, n, dtype=np.uint32).astype(np.int64)


def unit(x: np.ndarray) -> np.ndarray:
    """x of length 1, in fp32; its length is taken in double, which every machine sums alike."""
    return (x / np.linalg.norm(x.astype(np.float64))).astype(F32)


def themes(draws: Draws, segments: int, length: int, width: int = WIDTH, noise: float = 0.03) -> np.ndarray:
    """Contributions [T, d] of segments that are about `length` long, each around a direction of its own."""
    tokens = []
    for _ in range(segments):
        mean = unit(draws.randn(width))
        n = max(2, length + draws.randint(-2, 3))
        tokens += [mean + noise * draws.randn(width) for _ in range(n)]
    return np.stack(tokens).astype(np.float64)


def needles(draws: Draws, count: int, fill: int, width: int = WIDTH, noise: float = 0.02) -> Sequence:
    """A needle, a key with a value, and then about `fill` tokens of a theme; and again."""
    keys: list[np.ndarray] = []
    values: list[np.ndarray] = []
    places: list[int] = []
    for _ in range(count):
        places.append(len(keys))
        keys.append(unit(draws.randn(width)))
        values.append(unit(draws.randn(width)))
        theme_key, theme_value = unit(draws.randn(width)), unit(draws.randn(width))
        for _ in range(max(2, fill + draws.randint(-2, 3))):
            keys.append(unit(theme_key + noise * draws.randn(width)))
            values.append(theme_value + noise * draws.randn(width))
    return np.stack(keys).astype(np.float64), np.stack(values).astype(np.float64), places


@dataclass(frozen=True)
class Setting:
    """A row's kind of data: how many segments or needles, how long each is, and how many blocks are allowed (K)."""

    segments: int
    length: int
    budget: int
