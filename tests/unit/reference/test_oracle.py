"""The oracle against the specification, written out once more with plain loops over numbers, in double precision."""

from __future__ import annotations

from itertools import pairwise
from math import exp, log, sqrt, tanh

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamamem.reference.oracle import FEATURES, FROZEN, LIVE, PADDING, LayerTrace, MemoryShape, eval_layer

H, T = 12, 11
VECTORS = ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "w0", "a0", "k_k", "k_a", "ln_x.weight")


def random_layer(shape: MemoryShape, seed: int, gates: int | None = None) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    D, L, G = shape.width, 5, gates or shape.width
    sizes: dict[str, tuple[int, ...]] = {"mem_v": (D, H), "beta": (G, H), "beta_b": (G,)}
    sizes |= {"lambda": (G, H), "lambda_b": (G,)}
    sizes |= {f"rwkv.{x}": (D,) for x in VECTORS}
    sizes |= {f"rwkv.{x}.weight": (D, D) for x in ("receptance", "key", "value", "output")}
    sizes |= {f"rwkv.{x}1": (D, L) for x in "wag"} | {f"rwkv.{x}2": (L, D) for x in "wag"}
    sizes |= {"delta_q": (7, D), "delta_k": (3, D), "delta_v": (3, D), "delta_o": (H, D)}
    return {name: rng.normal(0, size[-1] ** -0.5, size).astype(np.float32) for name, size in sizes.items()}


def random_input(shape: MemoryShape, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed + 1000)
    S = rng.normal(0, 0.7, (shape.heads, shape.states, shape.rank, shape.rank)).astype(np.float32)
    return {
        "h": rng.normal(size=(T, H)).astype(np.float32),
        "S": S,
        "prev": rng.normal(size=shape.width).astype(np.float32),
        "mask": rng.choice([LIVE, FROZEN, PADDING], T, p=[0.6, 0.2, 0.2]),
    }


def by_hand(w: dict[str, np.ndarray], x: dict[str, np.ndarray], n: int, shape: MemoryShape) -> LayerTrace:
    """The specification, one number at a time."""
    N, M, R, D = shape.heads, shape.states, shape.rank, shape.width
    S = x["S"].astype(float).tolist()
    prev = x["prev"].tolist()
    log_rows: dict[str, list[list[float]]] = {name: [] for name in ("raw_read", "out", "delta_q", "delta_v")}

    def sigmoid(z: float) -> float:
        return 1 / (1 + exp(-z))

    def dot(a: list[float], b: list[float]) -> float:
        return sum(p * q for p, q in zip(a, b, strict=True))

    def apply(matrix: np.ndarray, v: list[float]) -> list[float]:
        return [dot(row, v) for row in matrix.astype(float).tolist()]

    def unit(v: list[float], eps: float) -> list[float]:
        out = []
        for i in range(N):
            head = v[i * R : i * R + R]
            out += [value / max(sqrt(dot(head, head)), eps) for value in head]
        return out

    def gate(name: str, h: list[float]) -> list[float]:
        z = [sigmoid(a + b) for a, b in zip(apply(w[name], h), w[f"{name}_b"].tolist(), strict=True)]
        return z if len(z) == D else [z[i // R] for i in range(D)]

    core = {name.removeprefix("rwkv."): value for name, value in w.items()}
    for t in range(T):
        h = x["h"][t].astype(float).tolist()
        s = apply(w["mem_v"], h)
        if shape.semantics == 2:
            s = unit([tanh(value) for value in s], 1e-6)
        beta = gate("beta", h)
        lam = [1 - b for b in beta] if shape.couple_lambda else gate("lambda", h)
        mixed = {c: [s[i] + (prev[i] - s[i]) * core[f"x_{c}"][i] for i in range(D)] for c in "rwkvag"}
        r, k0, v = (apply(core[f"{x}.weight"], mixed[x[0]]) for x in ("receptance", "key", "value"))
        lora = apply(core["w2"].T, [tanh(z) for z in apply(core["w1"].T, mixed["w"])])
        decay = [exp(-exp(-log(1 + exp(-(core["w0"][i] + lora[i]))) - 0.5)) for i in range(D)]
        lora = apply(core["a2"].T, apply(core["a1"].T, mixed["a"]))
        ag = [sigmoid(core["a0"][i] + lora[i]) for i in range(D)]
        g = apply(core["g2"].T, [sigmoid(z) for z in apply(core["g1"].T, mixed["g"])])
        kk = unit([k0[i] * core["k_k"][i] for i in range(D)], 1e-12)
        k = [k0[i] * (1 + (ag[i] - 1) * core["k_a"][i]) for i in range(D)]
        keep = {"standard": lam, "lambda_outside": lam, "no_lambda": [1.0] * D}[shape.update_mode]
        erase = [a * b for a, b in zip(lam, beta, strict=True)] if shape.update_mode == "lambda_outside" else beta
        if shape.semantics == 2:
            keep, erase = [1.0] * D, beta

        read = [0.0] * D
        for i in range(N if x["mask"][t] != PADDING else 0):
            rows = slice(i * R, i * R + R)
            y = [[dot(row, r[rows]) for row in S[i][m]] for m in range(M)]
            if shape.semantics == 2:
                norm = max(sqrt(dot(r[rows], r[rows])), 1e-6)
                score = [dot(z, r[rows]) / (max(sqrt(dot(z, z)), 1e-6) * norm) for z in y]
            else:
                score = [dot(z, r[rows]) / sqrt(R) for z in y]
            p = [exp(value - max(score)) for value in score]
            read[rows] = [sum(p[m] / sum(p) * y[m][j] for m in range(M)) for j in range(R)]
            if x["mask"][t] == LIVE:
                m = (n // shape.chunk) % M
                old, at = S[i][m], i * R
                Sa = [dot(row, [-z for z in kk[rows]]) for row in old]
                S[i][m] = [
                    [
                        keep[at + p] * decay[at + q] * old[p][q]
                        + beta[at + p] * v[at + p] * k[at + q]
                        + shape.erase_gate * erase[at + p] * Sa[p] * kk[at + q] * ag[at + q]
                        for q in range(R)
                    ]
                    for p in range(R)
                ]
        if x["mask"][t] == LIVE:
            prev, n = s, n + 1
        normed = []
        for i in range(N):
            head = read[i * R : i * R + R]
            mean = sum(head) / R
            variance = sum((z - mean) ** 2 for z in head) / R
            normed += [(z - mean) / sqrt(variance + 64e-5) for z in head]
        out = apply(core["output.weight"], [normed[i] * core["ln_x.weight"][i] * g[i] for i in range(D)])
        log_rows["raw_read"].append(read)
        log_rows["out"].append(out)
        for head in "qv":
            scale = shape.alpha / R
            log_rows[f"delta_{head}"].append([z * scale for z in apply(w[f"delta_{head}"], out)])
    result = {name: np.array(rows) for name, rows in log_rows.items()}
    return result | {"final_S": np.array(S), "final_prev": np.array(prev), "final_pos": np.array(n)}


@pytest.mark.parametrize("semantics", [1, 2])
@pytest.mark.parametrize("update_mode", ["standard", "lambda_outside", "no_lambda"])
@pytest.mark.parametrize(("heads", "gates", "couple"), [(1, None, True), (3, None, False), (3, 3, True), (2, 2, False)])
def test_is_the_specification(semantics: int, update_mode: str, heads: int, gates: int | None, couple: bool) -> None:
    shape = MemoryShape(H, 4, heads, 3, 2, semantics, 6.0, 0.7, update_mode, couple)
    w, x = random_layer(shape, 1, gates), random_input(shape, 2)
    got = eval_layer(w, **x, n_past=5, shape=shape)
    for name, want in by_hand(w, x, 5, shape).items():
        np.testing.assert_allclose(got[name].reshape(want.shape), want, rtol=2e-6, atol=5e-6, err_msg=name)


@settings(deadline=None, max_examples=30)
@given(
    cuts=st.sets(st.integers(1, T - 1)),
    semantics=st.sampled_from([1, 2]),
    n_past=st.integers(0, 20),
    seed=st.integers(0, 9),
)
def test_any_split_of_the_tokens_gives_the_same(cuts: set[int], semantics: int, n_past: int, seed: int) -> None:
    shape = MemoryShape(H, 4, 2, 3, 2, semantics)
    w, x = random_layer(shape, seed), random_input(shape, seed)
    whole = eval_layer(w, **x, n_past=n_past, shape=shape)
    S, prev, n = x["S"], x["prev"], n_past
    parts = []
    edges = [0, *sorted(cuts), T]
    for a, b in pairwise(edges):
        part = eval_layer(w, h=x["h"][a:b], S=S, prev=prev, n_past=n, shape=shape, mask=x["mask"][a:b])
        S, prev, n = part["final_S"], part["final_prev"], int(part["final_pos"])
        parts.append(part)
    for name in ("raw_read", "routes", "out", "delta_q", "w", "b"):
        np.testing.assert_allclose(
            np.concatenate([p[name] for p in parts]), whole[name], rtol=2e-5, atol=2e-5, err_msg=name
        )
    for name in ("final_S", "final_prev", "final_pos"):
        np.testing.assert_allclose(parts[-1][name], whole[name], rtol=2e-5, atol=2e-5, err_msg=name)


def test_frozen_tokens_read_and_leave_the_state_as_it_was() -> None:
    shape = MemoryShape(H, 4, 1, 3, 2)
    w, x = random_layer(shape, 3), random_input(shape, 3)
    frozen = eval_layer(w, **x | {"mask": np.full(T, FROZEN)}, n_past=7, shape=shape)
    np.testing.assert_array_equal(frozen["final_S"], x["S"])
    np.testing.assert_array_equal(frozen["final_prev"], x["prev"])
    assert frozen["final_pos"] == 7
    live = eval_layer(w, **x | {"mask": None}, n_past=7, shape=shape)
    np.testing.assert_array_equal(frozen["raw_read"][0], live["raw_read"][0])
    assert np.abs(frozen["raw_read"]).min(axis=1).max() > 0


def test_padding_tokens_might_as_well_not_be_there() -> None:
    shape = MemoryShape(H, 4, 2, 3, 2, semantics=2)
    w, x = random_layer(shape, 4), random_input(shape, 4)
    live = x["mask"] == LIVE
    padded = eval_layer(w, **x | {"mask": np.where(live, LIVE, PADDING)}, n_past=3, shape=shape)
    alone = eval_layer(w, **x | {"mask": None, "h": x["h"][live]}, n_past=3, shape=shape)
    np.testing.assert_allclose(padded["out"][live], alone["out"], rtol=2e-6, atol=3e-6)
    np.testing.assert_allclose(padded["final_S"], alone["final_S"], rtol=2e-6, atol=3e-6)
    for name in ("raw_read", "out", "delta_o"):
        np.testing.assert_array_equal(padded[name][~live], 0)


@pytest.mark.parametrize("semantics", [1, 2])
def test_the_first_token_of_a_fresh_sequence_gets_deltas_of_exactly_zero(semantics: int) -> None:
    shape = MemoryShape(H, 4, 2, 3, 2, semantics)
    w, x = random_layer(shape, 5), random_input(shape, 5)
    fresh = {"S": np.zeros_like(x["S"]), "prev": np.zeros(shape.width), "mask": None}
    trace = eval_layer(w, **x | fresh, n_past=0, shape=shape)
    assert not trace["delta_q"][0].any() and not trace["delta_o"][0].any()
    assert trace["delta_q"][1].any()


def test_only_the_current_state_changes() -> None:
    shape = MemoryShape(H, 4, 2, 3, 1024)
    w, x = random_layer(shape, 6), random_input(shape, 6)
    trace = eval_layer(w, **x, n_past=1024 * 4 + 5, shape=shape)  # (4101 // 1024) mod 3 = 1
    np.testing.assert_array_equal(trace["final_S"][:, [0, 2]], x["S"][:, [0, 2]])
    assert np.abs(trace["final_S"][:, 1] - x["S"][:, 1]).max() > 0.1


def test_features_continue_where_weights_leave_off() -> None:
    shape = MemoryShape(H, 4, 2, 3, 2)
    w, x = random_layer(shape, 7), random_input(shape, 7)
    whole = eval_layer(w, **x, n_past=2, shape=shape)
    gates = {"keep": whole["lam"], "erase": whole["beta"], "write": whole["beta"]}
    features = np.concatenate([(whole | gates)[name] for name in FEATURES], axis=1)
    trace = eval_layer(None, features=features, S=x["S"], prev=None, n_past=2, shape=shape, mask=x["mask"])
    for name in ("raw_read", "routes", "final_S", "final_pos"):
        np.testing.assert_array_equal(trace[name], whole[name])


def test_extreme_inputs_stay_finite() -> None:
    shape = MemoryShape(H, 4, 1, 3, 2)
    w, x = random_layer(shape, 8), random_input(shape, 8)
    trace = eval_layer(w, **x | {"h": x["h"] * 1e3}, n_past=0, shape=shape)
    assert all(np.isfinite(array).all() for array in trace.values())
