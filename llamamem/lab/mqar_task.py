"""Multi-query associative recall (MQAR): key-value pairs, then each key once more, to be answered with its value.

The task of arXiv 2312.04927 (zoology). Everything is drawn from the generator that is given: the same one, the same
examples, whichever model reads them.
"""

from __future__ import annotations

import numpy as np

IGNORED = -100  # the label of a position at which nothing is asked
POWER = 0.01  # a of the gaps' power law: most keys are asked for soon


def examples(
    rng: np.random.Generator, n: int, *, length: int, pairs: int, vocab: int, power: float = POWER
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and labels, both int64 [n, length]; the label stands where the model reads the key again.

    Keys are `pairs` of 1 .. vocab/2 - 1, values of vocab/2 .. vocab - 1, distinct within an example. Raises ValueError
    when they do not fit.
    """
    half = vocab // 2
    if length % 2 or 4 * pairs > length or pairs > half - 1 or pairs < 1:
        raise ValueError(f"{pairs} pairs of {half - 1} keys do not fit into {length} tokens")
    keys = _distinct(rng, n, half - 1, pairs) + 1
    values = _distinct(rng, n, half, pairs) + half
    gaps = _gaps(rng, n, (length - 2 * pairs) // 2, pairs, power)

    tokens = rng.integers(0, vocab, (n, length))  # the filler; what follows is written over it
    labels = np.full((n, length), IGNORED)
    tokens[:, 0 : 2 * pairs : 2] = keys
    tokens[:, 1 : 2 * pairs : 2] = values
    asked = 2 * pairs + 2 * gaps
    np.put_along_axis(tokens, asked, keys, axis=1)
    np.put_along_axis(labels, asked, values, axis=1)
    return tokens, labels


def _distinct(rng: np.random.Generator, n: int, of: int, count: int) -> np.ndarray:
    """`count` different numbers below `of` in each of n rows, any order as likely as any other."""
    return rng.random((n, of)).argsort(axis=1)[:, :count]


def _gaps(rng: np.random.Generator, n: int, space: int, count: int, power: float) -> np.ndarray:
    """`count` different gaps below `space` a row, one drawn after the other with p(gap) ~ (gap + 1) ** (power - 1).

    Drawing without replacement is a race of exponential clocks with those rates, in the order in which they ring.
    """
    rate = np.arange(1, space + 1) ** (power - 1)
    return (rng.exponential(size=(n, space)) / rate).argsort(axis=1)[:, :count]
