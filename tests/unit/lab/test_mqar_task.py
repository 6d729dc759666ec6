"""The MQAR generator, held to the definition of the task."""

from __future__ import annotations

import numpy as np
import pytest

from llamamem.lab.mqar_task import IGNORED, examples


def drawn(
    n: int = 200, length: int = 64, pairs: int = 8, vocab: int = 64, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    return examples(np.random.default_rng(seed), n, length=length, pairs=pairs, vocab=vocab)


def test_pairs_come_first_and_each_key_is_asked_for_once() -> None:
    tokens, labels = drawn()
    for row, wanted in zip(tokens, labels, strict=True):
        keys, values = row[0:16:2], row[1:16:2]
        assert len(set(keys)) == 8 and keys.min() >= 1 and keys.max() <= 31
        assert len(set(values)) == 8 and values.min() >= 32 and values.max() <= 63
        asked = np.flatnonzero(wanted != IGNORED)
        assert len(asked) == 8 and asked.min() >= 16 and asked.max() <= 62 and not (asked % 2).any()
        told = dict(zip(keys, values, strict=True))
        assert sorted(row[asked]) == sorted(keys)
        assert [told[key] for key in row[asked]] == wanted[asked].tolist()
    assert (labels[:, :16] == IGNORED).all()


def test_filler_is_of_the_whole_vocabulary() -> None:
    tokens, labels = drawn(n=2000, length=32, pairs=2, vocab=16)
    filler = tokens[:, 4:][labels[:, 4:] == IGNORED]
    share = np.bincount(filler, minlength=16) / len(filler)
    np.testing.assert_allclose(share, 1 / 16, atol=0.005)


def test_keys_and_values_are_uniform_and_independent() -> None:
    tokens, _ = drawn(n=4000, length=8, pairs=2, vocab=8)
    counts = np.zeros((3, 4))
    np.add.at(counts, (tokens[:, 0] - 1, tokens[:, 1] - 4), 1)
    np.testing.assert_allclose(counts / 4000, 1 / 12, atol=0.02)


@pytest.mark.parametrize("power", [0.01, 1.0])
def test_gaps_are_drawn_without_replacement_by_their_power_law(power: float) -> None:
    """The first key's gap has p(i) ~ i^(a-1); the second's, given the first, has the same p without that gap."""
    tokens, labels = examples(np.random.default_rng(1), 20_000, length=12, pairs=2, vocab=16, power=power)
    asked = labels != IGNORED
    first = np.argmax(asked & (tokens == tokens[:, :1]), axis=1)
    second = np.argmax(asked & (tokens == tokens[:, 2:3]), axis=1)
    p = np.arange(1, 5) ** (power - 1)
    p /= p.sum()
    pair = np.zeros((4, 4))
    np.add.at(pair, ((first - 4) // 2, (second - 4) // 2), 1 / 20_000)
    want = np.array([[p[i] * p[j] / (1 - p[i]) if i != j else 0 for j in range(4)] for i in range(4)])
    np.testing.assert_allclose(pair, want, atol=0.015)


def test_the_same_draws_the_same_examples() -> None:
    a, b, c = drawn(seed=3), drawn(seed=3), drawn(seed=4)
    assert (a[0] == b[0]).all() and (a[1] == b[1]).all() and (a[0] != c[0]).any()


@pytest.mark.parametrize(("length", "pairs", "vocab"), [(15, 2, 64), (16, 5, 64), (64, 16, 32), (16, 0, 64)])
def test_what_does_not_fit_is_refused(length: int, pairs: int, vocab: int) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        drawn(length=length, pairs=pairs, vocab=vocab)


def test_the_most_that_fits_does() -> None:
    tokens, labels = drawn(length=32, pairs=8, vocab=18)
    assert (labels != IGNORED).sum() == 200 * 8 and (labels[:, 16::2] != IGNORED).all() and tokens.max() < 18
