"""The parts of the DLA lab, each against its definition."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest

from llamamem.lab import dla_attention
from llamamem.lab.dla import bound
from llamamem.lab.dla_blocks import POLICIES, Case, block_of, by_information, equal, within_budget
from llamamem.lab.dla_cache import CACHES, consolidated, read
from llamamem.lab.dla_data import Draws, needles, themes
from llamamem.lab.dla_states import BETA, UPDATES, states, written
from llamamem.lab.intervals import interval, quantile, shown


def test_draws_are_those_of_pytorch() -> None:
    want = [-1.12583982, -1.15236021, -0.25057857, -0.43387885]
    np.testing.assert_allclose(Draws(0).randn(32)[:4], want, atol=5e-8)
    draws = Draws(0)
    assert [draws.randint(-2, 3) for _ in range(10)] == [2, 2, 1, -2, 1, 2, 0, 1, 0, 1]
    copied = draws.copy()
    assert [copied.randint(0, 1000) for _ in range(5)] == [draws.randint(0, 1000) for _ in range(5)]


def test_algorithm_1_finds_the_segments() -> None:
    starts, information = by_information(themes(Draws(0), 6, 24))
    assert starts == [0, 25, 51, 73, 96, 121]
    np.testing.assert_allclose(information[1:4], [0.248153, 0.246017, 0.165145], atol=1e-6)
    np.testing.assert_allclose(information[starts[1:]], [1.3563, 1.4633, 1.3543, 1.4883, 1.2816], atol=1e-4)
    others = np.delete(information, starts)
    assert others.max() == pytest.approx(0.28975, abs=1e-5)


def test_the_needles_are_the_published_ones() -> None:
    keys, values, places = needles(Draws(100), 6, 8)
    assert len(keys) == len(values) == 50 and places == [0, 7, 14, 25, 32, 43]
    np.testing.assert_allclose(keys[0, :3], [0.02007108, 0.21461981, 0.08911754], atol=1e-8)
    np.testing.assert_allclose(values[0, :3], [-0.30163016, 0.17532928, -0.01897847], atol=1e-8)
    outer = (values[:, :, None] * keys[:, None, :]).reshape(50, -1)
    assert by_information(outer)[0] == [0, 1, 7, 8, 14, 15, 25, 26, 32, 33, 43, 44]


def test_algorithm_2_merges_the_least_informed_neighbours_and_the_first_of_two_alike() -> None:
    information = np.array([0.0, 5, 5, 1, 1, 1, 1, 5])
    assert within_budget([0, 2, 4, 6], information, 3) == [0, 2, 6]  # densities 11/4, 4/4, 8/4 of the pairs
    assert within_budget([0, 2, 4, 6], np.ones(8), 3) == [0, 4, 6]
    assert within_budget([0, 2], information, 5) == [0, 2]


def test_equal_blocks_and_their_numbers() -> None:
    assert equal(10, 3) == [0, 3, 6] and equal(3, 8) == [0, 1, 2]
    assert block_of([0, 3, 6], 10).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 2]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_makes_a_partition(policy: str, seed: int) -> None:
    draws = Draws(seed)
    keys, values, places = needles(draws, 5, 3)
    case = Case((values[:, :, None] * keys[:, None, :]).reshape(len(keys), -1), places, 8, draws)
    starts = POLICIES[policy](case)
    assert starts[0] == 0 and starts == sorted(set(starts)) and starts[-1] < case.length
    assert starts == POLICIES[policy](case), "the same for all who ask"
    wanted = {"oracle": 10, "dla": 8, "fixed": 8, "noisy_dla": 8, "low_k_dla": 4}
    assert len(starts) == wanted[policy]


def test_the_updates_are_what_they_say() -> None:
    rng = np.random.default_rng(0)
    S, k, v = rng.normal(size=(4, 4)), rng.normal(size=4), rng.normal(size=4)
    kh = k / np.linalg.norm(k)
    by_hand = {
        "linear": S + np.outer(v, k),
        "delta_rule": (1 - BETA) * S - BETA * np.outer(S @ k, k) + BETA * np.outer(v, k),
        "rwkv7": 0.98 * S + np.outer(v, k) - np.outer(S @ kh, kh),
        "gdn": 0.98 * S + np.outer(v - 0.98 * S @ k, k),
    }
    assert set(by_hand) == set(UPDATES)
    for name, want in by_hand.items():
        after, added = written(S[None], UPDATES[name](k[None], v[None]))
        np.testing.assert_allclose(after[0], want, atol=1e-7, err_msg=name)
        kept = {"linear": 1.0, "delta_rule": 1 - BETA}.get(name, 0.98)
        assert added[0] == pytest.approx(np.linalg.norm(want - kept * S), abs=1e-7)


def test_a_state_holds_its_own_block_alone() -> None:
    rng = np.random.default_rng(1)
    keys, values = rng.normal(size=(2, 6, 4))
    both, _ = states(keys, values, [0, 2], UPDATES["rwkv7"])
    alone, _ = states(keys[2:], values[2:], [0], UPDATES["rwkv7"])
    np.testing.assert_array_equal(both[1], alone[0])


def test_the_bound_is_its_formula() -> None:
    u = np.arange(10.0).reshape(5, 2)
    want = math.sqrt(2) * math.sqrt(4 * 1.0) + math.sqrt(3) * math.sqrt(2 * 2 * 4.0)
    assert bound(u, [0, 2]) == pytest.approx(want)
    assert bound(u, [0, 1, 2, 3, 4]) == 0


def test_log_linear_attention_sees_each_token_at_one_level() -> None:
    assert [dla_attention.level(5, s) for s in range(6)] == [3, 3, 3, 3, 1, 0]
    assert [dla_attention.level(6, s) for s in range(7)] == [3, 3, 3, 3, 2, 2, 0]
    assert dla_attention.levels(32) == 6
    same, differs = dla_attention.smoke()
    assert same and differs < 1e-12


def test_a_cache_keeps_what_surprised_and_forgets_what_is_repeated() -> None:
    keys = np.eye(4)[[0, 1, 0, 2, 3]]
    added = np.array([1.0, 0.9, 0.1, 0.8, 0.4])
    assert consolidated(keys, added, 2) == [3, 1], "the first was repeated: it is worth half, and the fourth more"
    assert CACHES["plain"](keys, added, 2) == [0, 1] and CACHES["recency"](keys, added, 2) == [3, 4]
    assert consolidated(keys, np.ones(5), 2) == [0, 1], "a token that is worth as much takes nobody's place"


def test_a_cache_that_is_not_sure_is_not_heard() -> None:
    S, q = np.eye(3), np.array([1.0, 0, 0])
    alike = np.ones((4, 3))
    np.testing.assert_allclose(read(S, q, alike, alike, 5.0), q, atol=1e-6)
    sharp = read(S, q, np.eye(3), np.eye(3)[::-1], 50.0)
    np.testing.assert_allclose(sharp, [1, 0, 1], atol=1e-6)


def test_intervals_are_students() -> None:
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.3027 / math.sqrt(3))
    assert interval([1.0]) == (1.0, math.inf) and shown([1.0]) == "+1.000 ± ?"
    assert quantile(31) == pytest.approx(2.0395, abs=1e-4) and quantile(29) > quantile(30) > quantile(31)
    assert quantile(10**9) == pytest.approx(NormalDist().inv_cdf(0.975), abs=1e-5)
