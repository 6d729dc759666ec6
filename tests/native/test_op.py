"""The compiled op, one layer at a time: the reference's fixtures, and random layers against the NumPy oracle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from native_runs import layer_reports, run_layer

from llamamem.reference.oracle import FROZEN, LIVE, PADDING, MemoryShape, eval_layer

pytestmark = pytest.mark.native

ATOL = 1e-5
LAYERS = sorted((Path(__file__).parents[1] / "data" / "layers").glob("layer_*.npz"))
HIDDEN, TOKENS = 48, 37
SHAPES = {
    "published": MemoryShape(HIDDEN),
    "semantics-2": MemoryShape(HIDDEN, semantics=2, chunk=5),
    "lambda-outside": MemoryShape(HIDDEN, update_mode="lambda_outside", chunk=1, erase_gate=0.5),
    "no-lambda": MemoryShape(HIDDEN, update_mode="no_lambda", chunk=8, states=3),
    "uncoupled": MemoryShape(HIDDEN, couple_lambda=False, chunk=6),
    "two-heads": MemoryShape(HIDDEN, heads=2, chunk=7, states=3),
    "two-heads-semantics-2": MemoryShape(HIDDEN, heads=2, semantics=2, chunk=7),
    "rank-16": MemoryShape(HIDDEN, rank=16, states=2, chunk=10),
    "one-state": MemoryShape(HIDDEN, states=1, chunk=4),
}


def random_weights(shape: MemoryShape, seed: int, gates_per_head: bool = False) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    d, lora = shape.width, 2 * shape.width
    n_gates = shape.heads if gates_per_head else d

    def normal(*size: int, std: float = 1.0, mean: float = 0.0) -> np.ndarray:
        return (mean + std * rng.standard_normal(size)).astype(np.float32)

    w = {"mem_v": normal(d, shape.hidden, std=0.1)}
    for gate in ("beta",) if shape.couple_lambda else ("beta", "lambda"):
        w |= {gate: normal(n_gates, shape.hidden, std=0.1), f"{gate}_b": normal(n_gates, std=0.5, mean=-1)}
    for name in ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g"):
        w[f"rwkv.{name}"] = rng.random(d, np.float32)
    w |= {"rwkv.w0": normal(d, mean=-2.0), "rwkv.a0": normal(d), "rwkv.k_k": normal(d, std=0.2, mean=0.6)}
    w |= {"rwkv.k_a": normal(d, std=0.1, mean=1.0), "rwkv.ln_x.weight": normal(d, std=0.2, mean=1.0)}
    w["rwkv.ln_x.bias"] = normal(d, mean=3.0)  # is in the file and must not be applied
    for name in ("w", "a", "g"):
        w |= {f"rwkv.{name}1": normal(d, lora, std=0.35), f"rwkv.{name}2": normal(lora, d, std=0.27)}
    for name in ("receptance", "key", "value", "output"):
        w[f"rwkv.{name}.weight"] = normal(d, d, std=0.35)
    return w | {
        f"delta_{head}": normal(width, d, std=0.1) for head, width in (("q", 64), ("k", 32), ("v", 24), ("o", 48))
    }


def random_state(shape: MemoryShape, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    S = rng.standard_normal((shape.heads, shape.states, shape.rank, shape.rank)).astype(np.float32) * 0.3
    return {"S": S, "prev": rng.standard_normal(shape.width).astype(np.float32), "n_past": 11}


def assert_close(got: dict[str, np.ndarray], want: dict[str, np.ndarray], rows: np.ndarray | None = None) -> None:
    """`rows` limits per-token arrays to the tokens that are defined."""
    assert set(got) == set(want)
    for name, value in want.items():
        a, b = got[name].reshape(value.shape), value
        if rows is not None and not name.startswith("final_"):
            a, b = a[rows], b[rows]
        np.testing.assert_allclose(a, b, atol=ATOL, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("path", LAYERS, ids=lambda path: path.stem)
def test_fixture(product: Any, path: Path) -> None:
    for report in product(layer_reports, [path], ATOL):
        assert report.ok, report.tensors


def test_there_are_fixtures() -> None:
    assert LAYERS


@pytest.mark.parametrize("name", SHAPES)
def test_random_layer_matches_oracle(product: Any, name: str) -> None:
    shape = SHAPES[name]
    weights, state = random_weights(shape, 1), random_state(shape, 2)
    h = np.random.default_rng(3).standard_normal((TOKENS, shape.hidden)).astype(np.float32)
    assert_close(product(run_layer, weights, h=h, shape=shape, **state), eval_layer(weights, h=h, shape=shape, **state))


def test_gates_of_one_value_a_head(product: Any) -> None:
    shape = SHAPES["two-heads"]
    weights, state = random_weights(shape, 1, gates_per_head=True), random_state(shape, 2)
    h = np.random.default_rng(3).standard_normal((TOKENS, shape.hidden)).astype(np.float32)
    assert_close(product(run_layer, weights, h=h, shape=shape, **state), eval_layer(weights, h=h, shape=shape, **state))


@pytest.mark.parametrize("name", ["published", "semantics-2", "two-heads"])
def test_masked_tokens(product: Any, name: str) -> None:
    """Frozen tokens read, padding reads zero; neither writes, shifts nor counts."""
    shape = replace(SHAPES[name], chunk=3)
    weights, state = random_weights(shape, 1), random_state(shape, 2)
    rng = np.random.default_rng(3)
    h = rng.standard_normal((TOKENS, shape.hidden)).astype(np.float32)
    mask = rng.choice([LIVE, FROZEN, PADDING], TOKENS)
    got = product(run_layer, weights, h=h, shape=shape, mask=mask, **state)
    assert_close(got, eval_layer(weights, h=h, shape=shape, mask=mask, **state), mask != PADDING)
    for padded in ("raw_read", "delta_q", "delta_o"):
        assert not got[padded][mask == PADDING].any()
    only_live = product(run_layer, weights, h=h[mask == LIVE], shape=shape, **state)
    np.testing.assert_allclose(got["final_S"], only_live["final_S"], atol=1e-6)
    assert got["final_pos"] == only_live["final_pos"] == state["n_past"] + (mask == LIVE).sum()


def test_splits_give_the_same(product: Any) -> None:
    shape = SHAPES["semantics-2"]
    weights, state = random_weights(shape, 1), random_state(shape, 2)
    h = np.random.default_rng(3).standard_normal((TOKENS, shape.hidden)).astype(np.float32)
    whole = product(run_layer, weights, h=h, shape=shape, **state)
    parts = []
    for part in np.split(h, [1, 2, 9, 20]):
        parts.append(product(run_layer, weights, h=part, shape=shape, **state))
        state = {"S": parts[-1]["final_S"], "prev": parts[-1]["final_prev"], "n_past": int(parts[-1]["final_pos"])}
    for name in ("raw_read", "delta_q", "delta_o"):
        np.testing.assert_allclose(np.concatenate([part[name] for part in parts]), whole[name], atol=2e-6)
    np.testing.assert_allclose(parts[-1]["final_S"], whole["final_S"], atol=2e-6)


@pytest.mark.parametrize("name", ["published", "semantics-2", "two-heads"])
@pytest.mark.parametrize(("S", "prev"), [(3.4e38, None), (np.inf, None), (np.nan, None), (None, 1e25), (None, np.nan)])
def test_a_state_that_overflows_gives_nothing(product: Any, name: str, S: float | None, prev: float | None) -> None:
    """What is not finite stays in the state, where it is seen; no output has it, also of tokens that write nothing."""
    shape = SHAPES[name]
    weights, state = random_weights(shape, 1), random_state(shape, 2)
    if S is not None:
        state["S"] = np.full_like(state["S"], S)
    if prev is not None:
        state["prev"] = np.full_like(state["prev"], prev)
    h = np.random.default_rng(3).standard_normal((TOKENS, shape.hidden)).astype(np.float32)
    for mask in (None, np.full(TOKENS, FROZEN)):
        before = {key: np.copy(value) for key, value in state.items()}
        got = product(run_layer, weights, h=h, shape=shape, **before, **({} if mask is None else {"mask": mask}))
        for output in ("delta_q", "delta_o"):
            assert np.isfinite(got[output]).all()
            if S is not None:
                assert not got[output].any()
        if mask is not None:
            assert np.array_equal(got["final_S"].reshape(state["S"].shape), state["S"], equal_nan=True)
        else:
            assert not np.isfinite(got["final_S"]).all() or not np.isfinite(got["final_prev"]).all()


@pytest.mark.parametrize("semantics", [1, 2])
def test_features_instead_of_weights(product: Any, semantics: int) -> None:
    shape = MemoryShape(HIDDEN, semantics=semantics, chunk=4)
    rng = np.random.default_rng(4)
    features = rng.standard_normal((TOKENS, 9, shape.width)).astype(np.float32) * 0.4
    features[:, [1, 6, 7, 8]] = rng.random((TOKENS, 4, shape.width), np.float32)  # decay, keep, erase, write: 0..1
    features[:, 3] /= np.sqrt(shape.rank)
    state, given = random_state(shape, 2), features.reshape(TOKENS, -1)
    mask = rng.choice([LIVE, FROZEN, PADDING], TOKENS, p=[0.7, 0.15, 0.15])
    arguments = {"features": given, "shape": shape, "mask": mask, **state}
    assert_close(product(run_layer, None, **arguments), eval_layer(None, **arguments))
