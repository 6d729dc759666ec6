"""Log-linear attention (arXiv 2506.04761) in its two forms: a masked product of all tokens, and a recurrence.

T tokens, d numbers a head; L levels, of which level l is a state of 2 ** (l - 1) tokens and level 0 the token itself.
"""

from __future__ import annotations

import math

import numpy as np


def levels(length: int) -> int:
    """How many levels `length` tokens need."""
    return math.ceil(math.log2(length)) + 1


def level(t: int, s: int) -> int:
    """The level at which token t sees token s <= t."""
    if s == t:
        return 0
    power = t.bit_length() - 1
    return power + 1 if s < 1 << power else level(t - (1 << power), s - (1 << power))


def materialised(q: np.ndarray, k: np.ndarray, v: np.ndarray, decay: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """(H * (q k')) v, [T, d], of q, k, v [T, d], the gate of each token [T] and its weight of each level [T, L]."""
    T = len(q)
    H = np.zeros((T, T))
    for t in range(T):
        for s in range(t + 1):
            H[t, s] = weight[t, level(t, s)] * np.prod(decay[s + 1 : t + 1])
    return (H * (q @ k.T)) @ v


def recurrent(q: np.ndarray, k: np.ndarray, v: np.ndarray, decay: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The same, token by token, from one state a level: a full one is added to the next, as in counting."""
    S, count = np.zeros((weight.shape[1], k.shape[1], v.shape[1])), np.zeros(weight.shape[1], int)
    y = np.empty_like(v)
    for t in range(len(q)):
        l = 0
        while count[l] == 1 << l:
            S[l + 1] += S[l]
            count[l + 1] += count[l]
            S[l], count[l] = 0, 0
            l += 1
        S *= decay[t]
        S[0], count[0] = np.outer(k[t], v[t]), 1
        y[t] = q[t] @ np.tensordot(weight[t], S, axes=1)
    return y


def smoke(seed: int = 0, length: int = 32, width: int = 16) -> tuple[bool, float]:
    """Whether both forms are finite and the same for random gates and weights, and by how much they differ."""
    rng = np.random.default_rng(seed)
    q, k, v = rng.normal(size=(3, length, width))
    decay, weight = rng.uniform(0.8, 1, length), rng.normal(size=(length, levels(length)))
    a, b = materialised(q, k, v, decay, weight), recurrent(q, k, v, decay, weight)
    differs = float(np.abs(a - b).max())
    return bool(np.isfinite(a).all() and np.isfinite(b).all() and differs < 1e-10), differs
