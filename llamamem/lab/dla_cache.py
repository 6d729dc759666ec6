"""The cache of HOLA (arXiv 2607.02303): a few exact tokens beside the states, chosen by what they added to them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from llamamem.lab.dla_blocks import Starts, block_of
from llamamem.lab.dla_states import Update, cosine, states

SURPRISE = 0.5  # a token that adds less is a repetition
ALIKE = 0.9  # cosine of keys from which on a repetition weakens an entry
FLAT = 0.83  # scale of the read that hardly prefers any entry; the sharp one is the root of d

Entries = list[int]  # positions of tokens


def consolidated(keys: np.ndarray, added: np.ndarray, width: int) -> Entries:
    """What surprised the state; repetitions halve the score of what they repeat, a stronger token takes its place."""
    norms = np.linalg.norm(keys, axis=1)
    alike = np.abs(np.einsum("id,jd->ij", keys, keys)) > ALIKE * np.outer(norms, norms)  # no BLAS, no threads to wake
    entries: Entries = []
    scores: list[float] = []
    for t, strength in enumerate(added):
        if strength < SURPRISE:
            scores = [score / 2 if alike[entry, t] else score for entry, score in zip(entries, scores, strict=True)]
        if len(entries) < width:
            entries.append(t)
            scores.append(float(strength))
        elif strength > min(scores):
            weakest = scores.index(min(scores))
            entries[weakest], scores[weakest] = t, float(strength)
    return entries


def largest(keys: np.ndarray, added: np.ndarray, width: int) -> Entries:
    """The tokens that added most."""
    return [int(t) for t in np.argsort(-added, kind="stable")[:width]]


def recent(keys: np.ndarray, added: np.ndarray, width: int) -> Entries:
    """The last tokens."""
    return list(range(max(0, len(keys) - width), len(keys)))


CACHES: dict[str, Callable[[np.ndarray, np.ndarray, int], Entries]] = {
    "hola": consolidated,
    "plain": largest,
    "recency": recent,
}


def read(S: np.ndarray, q: np.ndarray, keys: np.ndarray, values: np.ndarray, scale: float) -> np.ndarray:
    """What a state and a cache [n, d] answer together: the cache counts for as much as it is sure of one entry."""
    scores = scale * (keys @ q)
    p = np.exp(scores - scores.max())
    p /= p.sum()
    n = len(p)
    gate = max(0.0, (p.max() - 1 / n) / (1 - 1 / n)) if n > 1 else 1.0
    return _unit(S @ q) + gate * _unit(p @ values)


def _unit(x: np.ndarray) -> np.ndarray:
    return np.asarray(x / (np.linalg.norm(x) + 1e-8))


class Memory:
    """The states of a sequence's blocks after its last token, to be read with a cache or without."""

    def __init__(self, keys: np.ndarray, values: np.ndarray, needles: Entries, starts: Starts, update: Update):
        self.keys, self.values, self.needles = keys, values, needles
        self.S, self.added = states(keys, values, starts, update)
        self.block = block_of(starts, len(keys))

    def recall(self, entries: Entries | None = None, *, flat: bool = False) -> float:
        """The mean cosine over needles, as of dla_states.recall."""
        scale = FLAT if flat else self.keys.shape[1] ** 0.5
        cosines = []
        for t in self.needles:
            S, q = self.S[self.block[t]], self.keys[t]
            answer = S @ q if entries is None else read(S, q, self.keys[entries], self.values[entries], scale)
            cosines.append(cosine(answer, self.values[t]))
        return float(np.mean(cosines))

    def held(self, entries: Entries) -> float:
        """The share of needles that are in the cache."""
        return len(set(self.needles) & set(entries)) / len(self.needles)
