"""`llamamem lab dla --check`: green as it is, and red for each way to get it wrong that is easily overlooked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from llamamem.lab import dla, dla_attention, dla_blocks, dla_states
from llamamem.lab.dla_check import published

Result = Any


@pytest.fixture
def red(llamamem: Callable[..., Result]) -> Callable[[str], bool]:
    """Whether --check exits with 1 and says of this experiment that it differs."""

    def ask(what: str) -> bool:
        done = llamamem("lab", "dla", "--check")
        return done.status == 1 and f"DIFFERS: {what}" in done.out and done.err == ""

    return ask


def test_all_published_figures_are_met(llamamem: Callable[..., Result]) -> None:
    done = llamamem("lab", "dla", "--check", "--hola")
    assert done.status == 0 and "DIFFERS" not in done.out and done.err == ""
    for figures in ("bound: trials (32)", "recall: trials (105)", "state_only: trials (120)"):
        assert f"ok: {figures}" in done.out
    assert "ok: hola: states with a cache (120)" in done.out


def test_the_published_figures_are_all_there() -> None:
    theirs = published()
    assert [len(theirs[name]["trials"]) for name in ("bound", "recall", "state_only")] == [8, 15, 30]
    assert [len(theirs[name]["rows"]) for name in ("bound", "recall", "state_only", "hola")] == [4, 3, 15, 30]
    assert len(theirs["hola"]["backbones"]) == 15 and "b077bd9" in theirs["source"]


# a wrong sign


def test_a_key_that_is_written_where_it_should_be_erased(red: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(k: np.ndarray, v: np.ndarray) -> dla_states.Features:
        features = dla_states.rwkv7(k, v)
        return features | {"a": -features["a"]}

    monkeypatch.setitem(dla.UPDATES, "rwkv7", wrong)
    assert red("state_only: trials")


def test_information_that_adds_where_it_should_compare(red: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = dla_blocks.score
    monkeypatch.setattr(dla_blocks, "score", lambda token, state: right(token, -state))
    assert red("bound: trials")


# a write before the read


def _write_first(S: np.ndarray, f: dict[str, np.ndarray], shape: Any) -> np.ndarray:
    S = f["keep"][:, :, None] * f["decay"][:, None, :] * S + (f["write"] * f["v"])[:, :, None] * f["k"][:, None, :]
    return S + (f["erase"] * np.einsum("nij,nj->ni", S, f["a"]))[:, :, None] * f["b"][:, None, :]


def test_a_token_that_reads_itself(red: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dla_states, "write_state", _write_first)
    assert red("state_only: trials")


def test_a_delta_rule_that_reads_what_it_has_kept_already(red: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = dla_states.write_state

    def wrong(S: np.ndarray, f: dict[str, np.ndarray], shape: Any) -> np.ndarray:
        return (_write_first if f["keep"].min() < 1 else right)(S, f, shape)

    monkeypatch.setattr(dla_states, "write_state", wrong)
    assert red("recall: trials")


# a merged pair chosen by the largest density


def test_the_most_informed_neighbours_are_merged(red: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = dla_blocks.density
    monkeypatch.setattr(dla_blocks, "density", lambda *args: -right(*args))
    assert red("bound: trials")


def test_the_most_informed_neighbours_are_merged_under_half_the_budget_alone(
    red: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = dla_blocks.within_budget

    def wrong(case: dla_blocks.Case) -> dla_blocks.Starts:
        starts, information = case.merged
        return right(starts, -information, max(1, case.budget // 2))

    monkeypatch.setitem(dla_blocks.POLICIES, "low_k_dla", wrong)
    assert red("state_only: trials")


# a boundary off by one


def test_a_block_that_begins_a_token_late(red: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = dla_blocks.by_information

    def wrong(u: np.ndarray, tau: float) -> tuple[dla_blocks.Starts, np.ndarray]:
        starts, information = right(u, tau)
        return [0, *(start + 1 for start in starts[1:] if start + 1 < len(u))], information

    monkeypatch.setattr(dla_blocks, "by_information", wrong)
    assert red("bound: trials")


def test_equal_blocks_that_are_a_token_longer(red: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = dla_blocks.equal
    monkeypatch.setattr(dla_blocks, "equal", lambda length, count: [0, *(s + 1 for s in right(length, count)[1:])])
    assert red("recall: trials")


def test_a_token_that_is_seen_a_level_too_high(red: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = dla_attention.level
    monkeypatch.setattr(dla_attention, "level", lambda t, s: right(t, s) if s == t else min(right(t, s) + 1, 5))
    assert red("log-linear attention")
