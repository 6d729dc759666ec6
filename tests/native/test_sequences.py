"""The memory follows its sequence: splits, neighbours, copies, removals, saved states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from native_runs import (
    continue_after,
    interleaved,
    load_other_variant,
    logits,
    logits_and_states,
    sequence_operations,
    set_and_get,
)

from llamamem.errors import LlamamemError
from llamamem.native.runtime import State

pytestmark = pytest.mark.native


def same_states(a: list[State], b: list[State]) -> bool:
    return all(
        np.array_equal(x.S, y.S) and np.array_equal(x.prev, y.prev) and x.n == y.n for x, y in zip(a, b, strict=True)
    )


def all_zero(states: list[State]) -> bool:
    return all(not state.S.any() and not state.prev.any() and state.n == 0 for state in states)


@pytest.mark.parametrize("how", ["same", "other", "fresh", "whole"])
def test_saved_state_continues_bit_for_bit(product: Any, small: tuple[Path, Path], how: str) -> None:
    ids = np.random.default_rng(5).integers(0, 1024, 120)
    expected, got, saved, loaded = product(continue_after, *small, ids, 90, how)
    np.testing.assert_array_equal(got, expected)
    assert same_states(loaded, saved)


@pytest.mark.parametrize("how", ["same", "other", "fresh", "whole"])
def test_saved_state_continues_past_the_sliding_window(
    exact: Any, base: Path, sidecars: dict[str, Path], reference: dict[str, np.ndarray], how: str
) -> None:
    """llama.cpp does not save cells that the window has left behind: sums are taken in another order, as in stock."""
    expected, got, saved, loaded = exact(continue_after, base, sidecars["v1"], reference["p0_ids"], 100, how)
    assert same_states(loaded, saved)
    assert saved[0].n == 100
    stock, stock_loaded, _, _ = exact(continue_after, base, None, reference["p0_ids"], 100, how)
    assert np.abs(got - expected).max() <= max(2 * np.abs(stock - stock_loaded).max(), 2e-5)


@pytest.mark.parametrize("n_seq", [2, 4, 8])
@pytest.mark.parametrize("unified", [False, True])
def test_interleaved_sequences_do_not_mix(
    exact: Any, base: Path, sidecars: dict[str, Path], reference: dict[str, np.ndarray], n_seq: int, unified: bool
) -> None:
    """Each prompt of a batch against itself alone; the base's own difference is the measure, as other sums are made."""
    p0, p1 = reference["p0_ids"], reference["p1_ids"]
    prompts = [np.roll(p0 if i % 2 else p1, i)[: 60 + 5 * i] for i in range(n_seq)]
    together, states = exact(interleaved, base, sidecars["v1"], prompts, unified=unified)
    base_together, _ = exact(interleaved, base, None, prompts, unified=unified)
    for i, prompt in enumerate(prompts):
        alone, alone_states = exact(logits_and_states, base, sidecars["v1"], prompt)
        stock = np.abs(base_together[i] - exact(logits, base, None, prompt)).max()
        assert np.abs(together[i] - alone).max() <= max(3 * stock, 5e-5)
        for got, want in zip(states[i], alone_states, strict=True):
            assert got.n == want.n == len(prompt)
            np.testing.assert_allclose(got.S, want.S, atol=1e-5, rtol=0)


def test_copy_keep_removal_and_clear(
    product: Any, base: Path, sidecars: dict[str, Path], reference: dict[str, np.ndarray]
) -> None:
    ids = reference["p1_ids"]
    alone, alone_states = product(logits_and_states, base, sidecars["v1"], ids)
    r = product(sequence_operations, base, sidecars["v1"], ids)

    assert same_states(r["written"], alone_states)
    assert [state.n for state in r["written"]] == [len(ids)] * 6
    assert r["refused"] is False  # memory cannot go back to the middle
    assert same_states(r["after_refusal"][0], r["written"])
    assert r["after_refusal"][1] == len(ids) - 1
    assert same_states(r["copy"], r["written"])
    np.testing.assert_array_equal(r["next_of_copy"], r["next_of_original"])
    original, copy = r["diverged"]
    assert not same_states(original, copy)
    assert (original[0].n, copy[0].n) == (len(ids) + 5, len(ids) + 9)
    assert all_zero(r["kept"][0])
    assert same_states(r["kept"][1], copy)
    removed, after_removal, positions = r["removed"]
    assert removed
    assert all_zero(after_removal)
    assert positions == (-1, -1)
    np.testing.assert_array_equal(r["again"], alone)
    assert all_zero(r["cleared"])
    np.testing.assert_array_equal(r["zero"], alone)


def test_states_can_be_replaced_and_bad_ones_are_refused(
    product: Any, base: Path, sidecars: dict[str, Path], reference: dict[str, np.ndarray]
) -> None:
    _, states = product(logits_and_states, base, sidecars["v1"], reference["p1_ids"])
    S, prev, n = states[0]
    not_finite = S.copy()
    not_finite[0, 1, 2, 3] = np.nan
    infinite = prev.copy()
    infinite[0] = np.inf
    bad = [State(not_finite, prev, n), State(S, infinite, n), State(S, prev, -1), State(S[:, :2], prev, n)]
    read_back, reasons = product(set_and_get, base, sidecars["v1"], states, bad)
    assert all(reasons), reasons
    assert same_states(read_back, states)


@pytest.mark.parametrize(
    ("mode", "options"),
    [("serial", {"n_ubatch": 2}), ("serial", {"n_ubatch": 1, "n_seq_max": 2}), ("fused", {"n_seq_max": 2})],
)
def test_context_outside_the_mode_is_refused(
    product: Any, base: Path, sidecars: dict[str, Path], mode: str, options: dict[str, int]
) -> None:
    with pytest.raises(LlamamemError, match=mode):
        product(logits, base, sidecars["v1"], np.arange(5), mode=mode, **options)


def test_serial_mode_runs_what_it_allows(product: Any, base: Path, sidecars: dict[str, Path]) -> None:
    ids = np.arange(10)
    serial = product(logits, base, sidecars["v1"], ids, mode="serial", n_ubatch=1)
    np.testing.assert_array_equal(serial, product(logits, base, sidecars["v1"], ids, mode="batched", n_ubatch=1))


def test_one_process_loads_one_variant(product: Any) -> None:
    with pytest.raises(LlamamemError, match="one process, one variant"):
        product(load_other_variant)
