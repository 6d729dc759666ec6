"""The states that hold a block's tokens, and what is read from them: one update of the reference's oracle each.

A state S [d, d] has values as rows and keys as columns. Every update is the oracle's `write_state`, which is what the
runtime is tested against, with other gates: S' = keep decay S + write v k' + erase (S a) b'.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from llamamem.lab.dla_blocks import Starts, block_of
from llamamem.reference.oracle import MemoryShape, write_state

DECAY = 0.98
BETA = float(1 / (1 + np.exp(1.5)))  # of the delta rule

_SHAPE = MemoryShape()  # of it, only that the erase gate is 1

Features = dict[str, np.ndarray]  # of tokens, [T, d] each
Update = Callable[[np.ndarray, np.ndarray], Features]  # of their keys and values


def linear(k: np.ndarray, v: np.ndarray) -> Features:
    """S' = S + v k'."""
    return _features(k, v, a=k, b=k, erase=0.0)


def delta_rule(k: np.ndarray, v: np.ndarray) -> Features:
    """S' = (1 - beta) S - beta (S k) k' + beta v k'."""
    return _features(k, v, a=-k, b=k, keep=1 - BETA, erase=BETA, write=BETA)


def rwkv7(k: np.ndarray, v: np.ndarray) -> Features:
    """S' = .98 S + v k' + (S (-kh)) kh', kh of length 1."""
    kh = k / (np.linalg.norm(k, axis=-1, keepdims=True) + 1e-8)
    return _features(k, v, a=-kh, b=kh, decay=DECAY)


def gdn(k: np.ndarray, v: np.ndarray) -> Features:
    """S' = .98 S + (v - .98 S k) k'."""
    return _features(k, v, a=-k, b=DECAY * k, decay=DECAY)


UPDATES: dict[str, Update] = {"linear": linear, "delta_rule": delta_rule, "rwkv7": rwkv7, "gdn": gdn}


def _features(
    k: np.ndarray,
    v: np.ndarray,
    *,
    a: np.ndarray,
    b: np.ndarray,
    keep: float = 1.0,
    decay: float = 1.0,
    erase: float = 1.0,
    write: float = 1.0,
) -> Features:
    gates = {"keep": keep, "decay": decay, "erase": erase, "write": write}
    return {"k": k, "v": v, "a": a, "b": b, **{name: np.full_like(k, gate) for name, gate in gates.items()}}


def states(keys: np.ndarray, values: np.ndarray, starts: Starts, update: Update) -> tuple[np.ndarray, np.ndarray]:
    """The state of each block after its tokens, from zero [blocks, d, d]; and the norm of what each token added [T].

    Blocks know nothing of each other: the i-th tokens of all of them are written at once, as heads of one memory.
    """
    features = update(keys, values)
    first, lengths = np.array(starts), np.diff([*starts, len(keys)])
    S = np.zeros((len(starts), values.shape[1], keys.shape[1]))
    added = np.zeros(len(keys))
    for i in range(lengths.max()):
        blocks = np.flatnonzero(lengths > i)
        tokens = first[blocks] + i
        S[blocks], added[tokens] = written(S[blocks], {name: value[tokens] for name, value in features.items()})
    return S, added


def written(S: np.ndarray, features: Features) -> tuple[np.ndarray, np.ndarray]:
    """States [N, d, d] after a token each, and the Frobenius norms of what it added to what was kept [N]."""
    after = write_state(S, features, _SHAPE)
    kept = features["keep"][:, :, None] * features["decay"][:, None, :] * S
    return after, np.linalg.norm(after - kept, axis=(1, 2))


def recall(keys: np.ndarray, values: np.ndarray, needles: list[int], starts: Starts, update: Update) -> float:
    """The mean cosine of what the needles' keys read, after the last token, and the needles' values.

    The state that is read is that of the needle's position: the reader is told where to look.
    """
    S, _ = states(keys, values, starts, update)
    block = block_of(starts, len(keys))
    return float(np.mean([cosine(S[block[t]] @ keys[t], values[t]) for t in needles]))


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b) + 1e-8))
