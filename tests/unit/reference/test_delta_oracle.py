"""The delta-rule oracle: the specification's test vector, number by number, and what follows from the maths."""

from __future__ import annotations

from itertools import pairwise
from math import exp, sqrt, tanh

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamamem.reference.delta_oracle import DeltaShape, eval_layer
from llamamem.reference.oracle import FROZEN, LIVE, PADDING, UPDATE_MODES

H, T = 24, 17

# W x of q, k, v and the beta logits for three tokens; what must come of them (spec of the delta rule, test vector)
GIVEN = (
    ((1, 0.5), (0.5, -0.25), (1, 2), (-1.5, 0)),
    ((0.3, -1), (1, 1), (-1, 0.5), (0.5, -1.5)),
    ((2, 1), (-0.5, 2), (0.25, -0.75), (0, 0)),
)
EXPECTED = {
    "q": ((0.8549266, 0.5187490), (0.3572603, -0.9340048), (0.7846770, 0.6199049)),
    "k": ((0.8835756, -0.4682885), (0.7071068, 0.7071068), (-0.4322626, 0.9017478)),
    "beta": ((0.1824255, 0.5), (0.6224593, 0.1824255), (0.5, 0.5)),
    "raw_read": ((0, 0), (0.1373756, 0.7530503), (-0.6235801, 0.3668914)),
}
STATES = (
    ((0.1611867, -0.0854278), (0.8835756, -0.4682885)),
    ((-0.4028691, -0.4959761), (0.7490065, -0.3562431)),
    ((-0.3144929, -0.0121359), (0.3971951, -0.2254593)),
)


def test_the_test_vector() -> None:
    """Weights that select: token t's W x are columns of the matrices, its h a unit vector."""
    q, k, v, logits = (np.array([token[i] for token in GIVEN], np.float32).T for i in range(4))
    weights = {"mem_q": q, "mem_k": k, "mem_v": v, "beta": logits, "beta_b": np.zeros(2)}
    shape = DeltaShape(hidden=3, rank=2)
    S = np.zeros((1, 2, 2))
    for t in range(3):
        trace = eval_layer(weights, h=np.eye(3)[t : t + 1], S=S, shape=shape)
        for name, rows in EXPECTED.items():
            np.testing.assert_allclose(trace[name][0], rows[t], atol=3e-7, rtol=0, err_msg=f"{name} of token {t + 1}")
        S = trace["final_S"]
        np.testing.assert_allclose(S[0], STATES[t], atol=3e-7, rtol=0, err_msg=f"state after token {t + 1}")
    whole = eval_layer(weights, h=np.eye(3), S=np.zeros((1, 2, 2)), shape=shape)
    np.testing.assert_allclose(whole["final_S"], S, atol=3e-7, rtol=0)
    assert whole["final_pos"] == 3


def random_layer(shape: DeltaShape, seed: int, *, per_head: bool = False, scale: int = 0, norm: bool = False) -> dict:
    rng = np.random.default_rng(seed)
    D, G = shape.width, shape.heads if per_head else shape.width
    sizes: dict[str, tuple[int, ...]] = {"mem_q": (D, H), "mem_k": (D, H), "mem_v": (D, H)}
    sizes |= {"beta": (G, H), "beta_b": (G,), "lambda": (G, H), "lambda_b": (G,)}
    sizes |= {"delta_q": (7, D), "delta_k": (3, D), "delta_v": (3, D), "delta_o": (H, D)}
    sizes |= {"delta_scale": (scale,)} if scale else {}
    sizes |= {"delta_o_norm": (H,)} if norm else {}
    return {name: rng.normal(0, 1.5 * size[-1] ** -0.5, size).astype(np.float32) for name, size in sizes.items()}


def random_input(shape: DeltaShape, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed + 1000)
    return {
        "h": rng.normal(size=(T, H)).astype(np.float32),
        "S": rng.normal(0, 0.7, (shape.heads, shape.rank, shape.rank)).astype(np.float32),
        "mask": rng.choice([LIVE, FROZEN, PADDING], T, p=[0.6, 0.2, 0.2]),
    }


def by_hand(w: dict[str, np.ndarray], x: dict[str, np.ndarray], shape: DeltaShape) -> dict[str, np.ndarray]:
    """The specification, one number at a time, in float64."""
    N, R, D = shape.heads, shape.rank, shape.width
    S = x["S"].astype(float).tolist()
    rows: dict[str, list[list[float]]] = {name: [] for name in ("raw_read", "delta_q", "delta_k", "delta_v", "delta_o")}

    def dot(a: list[float], b: list[float]) -> float:
        return sum(p * q for p, q in zip(a, b, strict=True))

    def apply(name: str, v: list[float]) -> list[float]:
        return [dot(row, v) for row in w[name].astype(float).tolist()]

    def sigmoid(z: float) -> float:
        return 1 / (1 + exp(-z))

    def unit(v: list[float]) -> list[float]:
        if not shape.normalize_qk:
            return v
        v = [tanh(z) for z in v]
        norms = [sqrt(dot(v[n * R : n * R + R], v[n * R : n * R + R])) for n in range(N)]
        return [z / max(norms[i // R], 1e-6) for i, z in enumerate(v)]

    def gate(name: str, h: list[float]) -> list[float]:
        z = [sigmoid(a + float(b)) for a, b in zip(apply(name, h), w[f"{name}_b"], strict=True)]
        return z if len(z) == D else [z[i // R] for i in range(D)]

    for t in range(T):
        h = x["h"][t].astype(float).tolist()
        q, k, v = unit(apply("mem_q", h)), unit(apply("mem_k", h)), apply("mem_v", h)
        beta = gate("beta", h)
        lam = [1 - b for b in beta] if shape.couple_lambda else gate("lambda", h)
        keep = [1.0] * D if shape.update_mode == "no_lambda" else lam
        erase = [a * b for a, b in zip(lam, beta, strict=True)] if shape.update_mode == "lambda_outside" else beta
        read = [0.0] * D
        for n in range(N):
            at = slice(n * R, n * R + R)
            if x["mask"][t] != PADDING:
                read[at] = [dot(row, q[at]) for row in S[n]]
            if x["mask"][t] == LIVE:
                Sk = [dot(row, k[at]) for row in S[n]]
                S[n] = [
                    [
                        keep[n * R + i] * S[n][i][j]
                        - erase[n * R + i] * Sk[i] * k[n * R + j]
                        + beta[n * R + i] * v[n * R + i] * k[n * R + j]
                        for j in range(R)
                    ]
                    for i in range(R)
                ]
        rows["raw_read"].append(read)
        for n, head in enumerate("qkvo"):
            scale = shape.alpha / R
            if "delta_scale" in w:
                scale *= shape.scale_max * sigmoid(float(w["delta_scale"][n if len(w["delta_scale"]) == 4 else 0]))
            out = [z * scale for z in apply(f"delta_{head}", read)]
            if head == "o" and "delta_o_norm" in w:
                mean = sum(z * z for z in out) / len(out)
                out = [
                    z / sqrt(mean + shape.o_rmsnorm_eps) * float(g) for z, g in zip(out, w["delta_o_norm"], strict=True)
                ]
            rows[f"delta_{head}"].append(out)
    return {name: np.array(value) for name, value in rows.items()} | {"final_S": np.array(S)}


@pytest.mark.parametrize("update_mode", UPDATE_MODES)
@pytest.mark.parametrize("couple", [True, False])
@pytest.mark.parametrize(
    ("heads", "per_head", "normalize", "scale", "norm"),
    [(1, False, True, 0, False), (3, True, True, 1, False), (2, False, True, 4, True), (2, True, False, 0, False)],
)
def test_is_the_specification(
    update_mode: str, couple: bool, heads: int, per_head: bool, normalize: bool, scale: int, norm: bool
) -> None:
    shape = DeltaShape(H, 4, heads, 6.0, update_mode, couple, normalize, scale_max=1.7, o_rmsnorm_eps=1e-3)
    w, x = random_layer(shape, 1, per_head=per_head, scale=scale, norm=norm), random_input(shape, 2)
    if not normalize:  # an unnormalised key above length 1 makes any state grow without bounds
        w["mem_k"] *= 0.3
    got = eval_layer(w, **x, shape=shape, n_past=5)
    for name, want in by_hand(w, x, shape).items():
        np.testing.assert_allclose(got[name], want, rtol=3e-6, atol=5e-6, err_msg=name)
    assert got["final_pos"] == 5 + (x["mask"] == LIVE).sum()


@settings(deadline=None, max_examples=30)
@given(cuts=st.sets(st.integers(1, T - 1)), mode=st.sampled_from(UPDATE_MODES), seed=st.integers(0, 9))
def test_any_split_of_the_tokens_gives_the_same(cuts: set[int], mode: str, seed: int) -> None:
    shape = DeltaShape(H, 4, 2, update_mode=mode, couple_lambda=False)
    w, x = random_layer(shape, seed), random_input(shape, seed)
    whole = eval_layer(w, **x, shape=shape)
    S, n, parts = x["S"], 0, []
    for a, b in pairwise([0, *sorted(cuts), T]):
        parts.append(eval_layer(w, h=x["h"][a:b], S=S, shape=shape, mask=x["mask"][a:b], n_past=n))
        S, n = parts[-1]["final_S"], int(parts[-1]["final_pos"])
    for name in ("raw_read", "delta_q", "delta_o"):
        joined = np.concatenate([part[name] for part in parts])
        np.testing.assert_allclose(joined, whole[name], rtol=2e-5, atol=2e-5, err_msg=name)
    np.testing.assert_allclose(S, whole["final_S"], rtol=2e-5, atol=2e-5)
    assert n == whole["final_pos"]


def test_an_empty_state_reads_exactly_zero_and_a_frozen_one_stays_as_it_is() -> None:
    shape = DeltaShape(H, 4, 2)
    w, x = random_layer(shape, 3), random_input(shape, 3)
    first = eval_layer(w, h=x["h"], S=np.zeros_like(x["S"]), shape=shape)
    assert not any(first[f"delta_{head}"][0].any() for head in "qkvo") and first["delta_o"][1].any()
    frozen = eval_layer(w, **x | {"mask": np.full(T, FROZEN)}, shape=shape)
    np.testing.assert_array_equal(frozen["final_S"], x["S"])
    assert frozen["final_pos"] == 0 and np.abs(frozen["raw_read"]).min(axis=1).min() > 0


def test_a_gate_that_is_shut_keeps_the_state() -> None:
    shape = DeltaShape(H, 4, 1)
    w, x = random_layer(shape, 4), random_input(shape, 4)
    shut = eval_layer(w | {"beta_b": np.full(4, -1e4)}, h=x["h"], S=x["S"], shape=shape)
    np.testing.assert_array_equal(shut["final_S"], x["S"])


@pytest.mark.parametrize("mode", ["no_lambda", "lambda_outside"])
def test_a_row_whose_gate_is_open_recalls_its_value_at_its_key(mode: str) -> None:
    """Keys have length 1. (In standard mode, coupled, what the row held at the key is taken off twice.)"""
    shape = DeltaShape(H, 4, 1, update_mode=mode)
    w, x = random_layer(shape, 4), random_input(shape, 4)
    gates = {"beta": np.zeros((4, H)), "beta_b": np.array([1e4, -1e4, -1e4, -1e4])}
    trace = eval_layer(w | gates, h=x["h"][:1], S=x["S"], shape=shape)
    recalled = trace["final_S"][0] @ trace["k"][0]
    np.testing.assert_allclose(recalled[0], trace["v"][0, 0], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(trace["final_S"][0, 1:], x["S"][0, 1:])


def test_it_is_the_rwkv_ms_scan_with_one_state() -> None:
    """decay 1, a = -k, b = k: what the one op of the runtime is given."""
    from llamamem.reference.oracle import MemoryShape
    from llamamem.reference.oracle import eval_layer as rwkv_layer

    shape = DeltaShape(H, 4, 3, couple_lambda=False)
    w, x = random_layer(shape, 6), random_input(shape, 6)
    own = eval_layer(w, **x, shape=shape)
    one = np.ones_like(own["q"])
    columns = (own["q"], one, own["k"], own["v"], -own["k"], own["k"], own["lam"], own["beta"], own["beta"])
    other = rwkv_layer(
        None,
        features=np.concatenate(columns, axis=1),
        S=x["S"],
        prev=None,
        n_past=0,
        shape=MemoryShape(H, 4, 3, states=1, semantics=1),
        mask=x["mask"],
    )
    np.testing.assert_allclose(other["raw_read"], own["raw_read"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(other["final_S"][:, 0], own["final_S"], rtol=1e-5, atol=1e-5)
