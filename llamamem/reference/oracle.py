"""NumPy fp32 oracle of one RWKV-MS memory layer (multi-state RWKV-7 memory, arXiv 2503.14456).

Shapes: T tokens, H hidden size, R rank, N state heads, D = N*R, M states a head, C tokens a chunk, L LoRA width.
Everything is fp32. The functions are pure: state goes in, state comes out. The features of all tokens are computed
at once and the scan token by token, so that any split of a token sequence gives the same result up to the order in
which sums are taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

# what the scan consumes, [T, D] each: the order of the columns of a features array [T, 9*D]
FEATURES = ("r", "decay", "k", "v", "a", "b", "keep", "erase", "write")
HEADS = ("q", "k", "v", "o")
UPDATE_MODES = ("standard", "lambda_outside", "no_lambda")

# values of the token mask: a frozen token reads and writes nothing, a padding token reads zero and writes nothing
LIVE, FROZEN, PADDING = 0, 1, 2

F32 = np.float32

# Named arrays of one layer. Per token [T, D]: s beta lam r w decay k v a b g raw_read out; routes [T, N, M];
# delta_{q,k,v,o} [T, width] for the heads in use; after the last token final_S [N, M, R, R], final_prev [D] and
# final_pos [] (int64, tokens written). When features were given: raw_read, routes, final_S and final_pos only.
LayerTrace = dict[str, np.ndarray]


class Heads(Protocol):
    """What has state heads: D = heads * rank."""

    @property
    def heads(self) -> int: ...

    @property
    def rank(self) -> int: ...


@dataclass(frozen=True)
class MemoryShape:
    """Sizes and rules of one memory layer; the defaults are those of the published checkpoint."""

    hidden: int = 2560  # H
    rank: int = 8  # R
    heads: int = 1  # N
    states: int = 4  # M
    chunk: int = 1024  # C, tokens
    semantics: int = 1  # 1 or 2
    alpha: float = 16.0  # deltas are scaled by alpha / R
    erase_gate: float = 1.0
    update_mode: str = "standard"  # one of UPDATE_MODES
    couple_lambda: bool = True

    @property
    def width(self) -> int:
        """D: the width of the memory source."""
        return self.heads * self.rank


def eval_layer(
    weights: Mapping[str, np.ndarray] | None,
    *,
    h: np.ndarray | None = None,
    features: np.ndarray | None = None,
    S: np.ndarray,
    prev: np.ndarray | None,
    n_past: int,
    shape: MemoryShape,
    mask: np.ndarray | None = None,
) -> LayerTrace:
    """Runs T tokens through one layer and returns every intermediate and the final state.

    Either `weights` (by sidecar short name, torch shapes) with `h [T, H]`, or `features [T, 9*D]` (see FEATURES).
    `S [N, M, R, R]`, `prev [D]` and `n_past` (tokens written so far) are the state before the first token.
    `mask [T]` holds LIVE, FROZEN or PADDING; without it every token is live.
    """
    S = np.asarray(S, F32).reshape(shape.heads, shape.states, shape.rank, shape.rank)
    if features is not None:
        features = np.asarray(features, F32).reshape(-1, len(FEATURES), shape.width)
        marks = _marks(mask, len(features))
        return scan(dict(zip(FEATURES, features.transpose(1, 0, 2), strict=True)), S, n_past, shape, marks)

    assert weights is not None and h is not None and prev is not None, "weights need h and prev"
    w = {name: np.asarray(value, F32) for name, value in weights.items()}
    marks = _marks(mask, len(h))
    s = memory_source(w, np.asarray(h, F32), shape)
    before, final_prev = time_shift(s, np.asarray(prev, F32).reshape(shape.width), marks)
    beta, lam = gates(w, np.asarray(h, F32), shape)
    f = mix(w, s, before, shape) | dict(zip(("keep", "erase", "write"), update_gates(beta, lam, shape), strict=True))
    trace = scan(f, S, n_past, shape, marks)
    out = project(w, trace["raw_read"], f["g"], shape)
    del f["keep"], f["erase"], f["write"]
    deltas = {
        f"delta_{x}": (out @ w[f"delta_{x}"].T) * F32(shape.alpha / shape.rank) for x in HEADS if f"delta_{x}" in w
    }
    return {"s": s, "beta": beta, "lam": lam, **f, **trace, "out": out, **deltas, "final_prev": final_prev}


def memory_source(w: Mapping[str, np.ndarray], h: np.ndarray, shape: MemoryShape) -> np.ndarray:
    """s [T, D] of h [T, H]."""
    s = h @ w["mem_v"].T
    return l2norm(np.tanh(s), shape, 1e-6) if shape.semantics == 2 else s


def gates(w: Mapping[str, np.ndarray], h: np.ndarray, shape: MemoryShape) -> tuple[np.ndarray, np.ndarray]:
    """beta and lam, both [T, D]; a gate of one value a head is repeated for the R rows of that head."""

    def gate(name: str) -> np.ndarray:
        x = sigmoid(h @ w[name].T + w[f"{name}_b"])
        return x if x.shape[-1] == shape.width else np.repeat(x, shape.rank, axis=-1)

    beta = gate("beta")
    return beta, F32(1) - beta if shape.couple_lambda else gate("lambda")


def time_shift(s: np.ndarray, prev: np.ndarray, marks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each token the source of the last written token before it [T, D], and that after all tokens [D]."""
    table = np.concatenate([prev[None], s])
    last = np.maximum.accumulate(np.concatenate([[0], np.where(marks == LIVE, np.arange(1, len(s) + 1), 0)]))
    return table[last[:-1]], table[last[-1]]


def mix(w: Mapping[str, np.ndarray], s: np.ndarray, before: np.ndarray, shape: MemoryShape) -> dict[str, np.ndarray]:
    """The RWKV-7 features r w decay k v a b g, [T, D] each, of s and the source of the token before."""
    core = {name.removeprefix("rwkv."): value for name, value in w.items() if name.startswith("rwkv.")}
    x = {n: s + (before - s) * core[f"x_{n}"] for n in "rwkvag"}
    r = x["r"] @ core["receptance.weight"].T
    w_log = -softplus(-(core["w0"] + np.tanh(x["w"] @ core["w1"]) @ core["w2"])) - F32(0.5)
    k0 = x["k"] @ core["key.weight"].T
    v = x["v"] @ core["value.weight"].T
    ag = sigmoid(core["a0"] + (x["a"] @ core["a1"]) @ core["a2"])
    g = sigmoid(x["g"] @ core["g1"]) @ core["g2"]
    kk = l2norm(k0 * core["k_k"], shape, 1e-12)
    k = k0 * (F32(1) + (ag - F32(1)) * core["k_a"])
    return {"r": r, "w": w_log, "decay": np.exp(-np.exp(w_log)), "k": k, "v": v, "a": -kk, "b": kk * ag, "g": g}


def update_gates(beta: np.ndarray, lam: np.ndarray, shape: MemoryShape) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """keep, erase and write, [T, D] each."""
    one = np.ones_like(beta)
    keep, erase = {
        "standard": (lam, beta),
        "lambda_outside": (lam, lam * beta),
        "no_lambda": (one, beta),
    }[shape.update_mode]
    return (one, beta, beta) if shape.semantics == 2 else (keep, erase, beta)


def scan(f: Mapping[str, np.ndarray], S: np.ndarray, n_past: int, shape: MemoryShape, marks: np.ndarray) -> LayerTrace:
    """Reads, then writes, token by token: raw_read [T, D], routes [T, N, M], final_S [N, M, R, R], final_pos []."""
    T, N, M, R = len(marks), shape.heads, shape.states, shape.rank
    f = {name: np.asarray(value, F32).reshape(T, N, R) for name, value in f.items()}
    S = S.copy()
    read, routes = np.zeros((T, N, R), F32), np.zeros((T, N, M), F32)
    for t in range(T):
        if marks[t] == PADDING:
            continue
        read[t], routes[t] = read_states(S, f["r"][t], shape)
        if marks[t] == LIVE:
            m = (n_past // shape.chunk) % M
            S[:, m] = write_state(S[:, m], {name: value[t] for name, value in f.items()}, shape)
            n_past += 1
    pos = np.array(n_past, np.int64)
    return {"raw_read": read.reshape(T, N * R), "routes": routes, "final_S": S, "final_pos": pos}


def read_states(S: np.ndarray, r: np.ndarray, shape: MemoryShape) -> tuple[np.ndarray, np.ndarray]:
    """The read [N, R] and its weights over the states [N, M], of S [N, M, R, R] and r [N, R]."""
    y = np.einsum("nmij,nj->nmi", S, r)
    score = np.einsum("nmi,ni->nm", y, r)
    if shape.semantics == 2:
        score = score / (_clamped_norm(y, 1e-6) * _clamped_norm(r, 1e-6)[:, None])
    else:
        score = score / np.sqrt(F32(shape.rank))
    p = np.exp(score - score.max(axis=-1, keepdims=True))
    p = p / p.sum(axis=-1, keepdims=True)
    return np.einsum("nm,nmi->ni", p, y), p


def write_state(S: np.ndarray, f: Mapping[str, np.ndarray], shape: MemoryShape) -> np.ndarray:
    """The state [N, R, R] after one token with the features f [N, R]; the right-hand S is the old one throughout."""
    erased = F32(shape.erase_gate) * f["erase"] * np.einsum("nij,nj->ni", S, f["a"])
    kept = f["keep"][:, :, None] * f["decay"][:, None, :] * S
    return kept + (f["write"] * f["v"])[:, :, None] * f["k"][:, None, :] + erased[:, :, None] * f["b"][:, None, :]


def project(w: Mapping[str, np.ndarray], read: np.ndarray, g: np.ndarray, shape: MemoryShape) -> np.ndarray:
    """out [T, D]: group norm of the read (one group a head, biased variance), no bias, gate, output projection."""
    x = read.reshape(-1, shape.heads, shape.rank)
    x = x - x.mean(axis=-1, keepdims=True)
    x = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + F32(64e-5))
    return (x.reshape(read.shape) * w["rwkv.ln_x.weight"] * g) @ w["rwkv.output.weight"].T


def l2norm(x: np.ndarray, shape: Heads, eps: float) -> np.ndarray:
    """x [T, D] with each head divided by max(its L2 norm, eps)."""
    heads = x.reshape(-1, shape.heads, shape.rank)
    return (heads / _clamped_norm(heads, eps)[..., None]).reshape(x.shape)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)), without overflow."""
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, F32(1), e) / (F32(1) + e)


def softplus(x: np.ndarray) -> np.ndarray:
    """log(1 + exp(x)), without overflow."""
    return np.logaddexp(x, F32(0))


def _clamped_norm(x: np.ndarray, eps: float) -> np.ndarray:
    return np.maximum(np.sqrt((x * x).sum(axis=-1)), F32(eps))


def _marks(mask: np.ndarray | None, n_tokens: int) -> np.ndarray:
    return np.zeros(n_tokens, np.int32) if mask is None else np.asarray(mask, np.int32).reshape(n_tokens)
