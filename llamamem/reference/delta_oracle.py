"""NumPy fp32 oracle of one delta-rule memory layer (delta-mem, arXiv 2605.12357).

Shapes: T tokens, H hidden size, R rank, N state heads, D = N*R, G = D with gates a row or N with gates a head. Row i of
a state is the value's index, column j the key's. Everything is fp32; the functions are pure, and any split of a token
sequence gives the same result up to the order in which sums are taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from llamamem.formats.sidecar import DELTA_CHUNK
from llamamem.reference.oracle import F32, HEADS, LIVE, PADDING, LayerTrace, l2norm, sigmoid

__all__ = ["DeltaShape", "eval_layer"]

_EPS = 1e-6  # of the norm of q and k


@dataclass(frozen=True)
class DeltaShape:
    """Sizes and rules of one layer; the defaults are those of the published checkpoint."""

    hidden: int = 2560  # H
    rank: int = 8  # R
    heads: int = 1  # N
    alpha: float = 16.0  # deltas are scaled by alpha / R, whatever N
    update_mode: str = "standard"  # one of oracle.UPDATE_MODES
    couple_lambda: bool = True
    normalize_qk: bool = True
    scale_max: float = 2.0  # of a trained delta scale
    o_rmsnorm_eps: float = 1e-6

    # what RWKV-MS has besides, as a state file has it: one state a head, and no chunks or semantics
    states: ClassVar[int] = 1
    chunk: ClassVar[int] = DELTA_CHUNK
    semantics: ClassVar[int] = 0

    @property
    def width(self) -> int:
        """D: the width of q, k, v and of a read."""
        return self.heads * self.rank


def eval_layer(
    weights: Mapping[str, np.ndarray],
    *,
    h: np.ndarray,
    S: np.ndarray,
    shape: DeltaShape,
    mask: np.ndarray | None = None,
    n_past: int = 0,
) -> LayerTrace:
    """Runs T tokens through one layer and returns every intermediate and the final state.

    `weights` are by sidecar short name, in torch shapes: mem_q mem_k mem_v [D, H], beta (lambda) [G, H], beta_b
    (lambda_b) [G], delta_{q,k,v,o} [width, D] of the heads in use, delta_scale [1] or [4], delta_o_norm [width]. `h`
    [T, H] is the layer's normed input, `S` [N, R, R] the state before the first token, `mask` [T] holds LIVE, FROZEN or
    PADDING. Per token [T, D]: q k v beta lam raw_read; delta_{q,k,v,o} [T, width]; final_S [N, R, R]; final_pos [].
    """
    w = {name: np.asarray(value, F32) for name, value in weights.items()}
    h = np.asarray(h, F32)
    marks = np.full(len(h), LIVE) if mask is None else np.asarray(mask)
    f = features(w, h, shape)
    read, S = scan(f, np.asarray(S, F32).reshape(shape.heads, shape.rank, shape.rank), shape, marks)
    deltas = {f"delta_{x}": delta(w, x, read, shape) for x in HEADS if f"delta_{x}" in w}
    pos = np.array(n_past + int((marks == LIVE).sum()), np.int64)
    return {**f, "raw_read": read, **deltas, "final_S": S, "final_pos": pos}


def features(w: Mapping[str, np.ndarray], h: np.ndarray, shape: DeltaShape) -> dict[str, np.ndarray]:
    """q, k, v, beta and lam of every token, [T, D] each; a gate of one value a head is repeated for its R rows."""

    def address(name: str) -> np.ndarray:
        x = h @ w[name].T
        return l2norm(np.tanh(x), shape, _EPS) if shape.normalize_qk else x

    def gate(name: str) -> np.ndarray:
        x = sigmoid(h @ w[name].T + w[f"{name}_b"])
        return x if x.shape[-1] == shape.width else np.repeat(x, shape.rank, axis=-1)

    beta = gate("beta")
    if shape.update_mode == "no_lambda":
        lam = np.ones_like(beta)
    else:
        lam = F32(1) - beta if shape.couple_lambda else gate("lambda")
    return {"q": address("mem_q"), "k": address("mem_k"), "v": h @ w["mem_v"].T, "beta": beta, "lam": lam}


def scan(
    f: Mapping[str, np.ndarray], S: np.ndarray, shape: DeltaShape, marks: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Reads [T, D], each before its token's write, and the state after all tokens [N, R, R]."""
    T, N, R = len(marks), shape.heads, shape.rank
    f = {name: value.reshape(T, N, R) for name, value in f.items()}
    erase = f["lam"] * f["beta"] if shape.update_mode == "lambda_outside" else f["beta"]
    reads = np.zeros((T, N, R), F32)
    for t in range(T):
        if marks[t] != PADDING:
            reads[t] = np.einsum("nij,nj->ni", S, f["q"][t])
        if marks[t] == LIVE:
            k = f["k"][t]
            new = f["beta"][t] * f["v"][t] - erase[t] * np.einsum("nij,nj->ni", S, k)
            S = f["lam"][t][:, :, None] * S + new[:, :, None] * k[:, None, :]
    return reads.reshape(T, N * R), S


def delta(w: Mapping[str, np.ndarray], head: str, read: np.ndarray, shape: DeltaShape) -> np.ndarray:
    """What is added to a head's projection, [T, width]."""
    scale = np.full(1, shape.alpha / shape.rank, F32)
    if "delta_scale" in w:
        scale = scale * F32(shape.scale_max) * sigmoid(w["delta_scale"])
    out = (read @ w[f"delta_{head}"].T) * scale[HEADS.index(head) if len(scale) > 1 else 0]
    if head == "o" and "delta_o_norm" in w:
        mean = (out * out).mean(axis=-1, keepdims=True)
        out = out / np.sqrt(mean + F32(shape.o_rmsnorm_eps)) * w["delta_o_norm"]
    return out
