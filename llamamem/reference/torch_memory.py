"""One RWKV-MS memory layer in PyTorch: differentiable, batched, the same maths as the NumPy oracle.

B sequences, T tokens, H hidden size, R rank, N state heads, D = N*R, M states a head, C tokens a chunk. Everything is
fp32, whatever the type of `h`. All that does not depend on the state is computed for all tokens at once; the scan over
tokens only writes, and the reads of all tokens follow from the states that it kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llamamem.formats.sidecar.layout import short_name
from llamamem.reference.delta_oracle import DeltaShape
from llamamem.reference.oracle import FEATURES, FROZEN, HEADS, LIVE, PADDING, LayerTrace, MemoryShape
from llamamem.reference.recurrence import recurrence

__all__ = ["FROZEN", "LIVE", "PADDING", "Memory", "MemoryState", "eval_layer", "from_weights", "scan"]

_VECTORS = ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "w0", "a0", "k_k", "k_a")
_MATRICES = ("receptance", "key", "value", "output")

Trace = dict[str, Tensor]


class MemoryState(NamedTuple):
    """The memory of B sequences in one layer. It is a value: nothing changes it in place."""

    S: Tensor  # [B, N, M, R, R]
    prev: Tensor  # [B, D], the source of the last token written
    n: Tensor  # [B] int64, tokens written

    def detach(self) -> MemoryState:
        """The same values, cut from the graph: truncated back-propagation goes no further."""
        return MemoryState(self.S.detach(), self.prev.detach(), self.n)


class _Core(nn.Module):
    """The parameters below `hrm_rwkv7_core`. `ln_x.bias` is in every checkpoint and is not applied."""

    def __init__(self, width: int, lora: int):
        super().__init__()
        for name in _VECTORS:
            self.register_parameter(name, nn.Parameter(torch.zeros(width)))
        for x in "wag":
            self.register_parameter(f"{x}1", nn.Parameter(torch.zeros(width, lora)))
            self.register_parameter(f"{x}2", nn.Parameter(torch.zeros(lora, width)))
        for name in _MATRICES:
            module = nn.Module()
            module.weight = nn.Parameter(torch.zeros(width, width))
            setattr(self, name, module)
        self.ln_x = nn.Module()
        self.ln_x.weight = nn.Parameter(torch.ones(width))
        self.ln_x.bias = nn.Parameter(torch.zeros(width))

    def at(self, name: str) -> Tensor:
        """A parameter by its name in the checkpoint."""
        return self.get_parameter(name)


def add_projections(
    module: nn.Module, shape: MemoryShape | DeltaShape, widths: Mapping[str, int], rankwise_gates: bool
) -> None:
    """What memories of both kinds project with: into q, k and v, to the gates, and out to the deltas."""
    D, H = shape.width, shape.hidden
    G = D if rankwise_gates else shape.heads
    for name in ("memory_q_proj", "memory_k_proj", "memory_v_proj"):
        module.register_parameter(name, nn.Parameter(torch.zeros(D, H)))
    for name in ("beta",) if shape.couple_lambda else ("beta", "lambda"):
        module.register_parameter(f"{name}_proj", nn.Parameter(torch.zeros(G, H)))
        module.register_parameter(f"{name}_bias", nn.Parameter(torch.zeros(G)))
    for head in HEADS:
        if head in widths:
            module.register_parameter(f"delta_{head}_proj", nn.Parameter(torch.zeros(widths[head], D)))


class Memory(nn.Module):
    """The memory beside one attention layer.

    Its parameters are named as in a checkpoint, behind `model.language_model.layers.{L}.self_attn.`; a new one is
    all zeros and adds nothing. `widths` has the output width of each head's projection in the base; heads outside
    `delta_heads` have a parameter, as in a checkpoint, and no effect.
    """

    def __init__(
        self,
        shape: MemoryShape,
        widths: Mapping[str, int],
        delta_heads: tuple[str, ...] = ("q", "o"),
        *,
        lora: int = 32,
        rankwise_gates: bool = True,
    ):
        super().__init__()
        self.shape = shape
        self.delta_heads = delta_heads
        add_projections(self, shape, widths, rankwise_gates)
        self.hrm_rwkv7_core = _Core(shape.width, lora)

    def fresh(self, batch: int = 1) -> MemoryState:
        """The empty memory of `batch` sequences."""
        shape, on = self.shape, next(self.parameters()).device
        S = torch.zeros(batch, shape.heads, shape.states, shape.rank, shape.rank, device=on)
        prev = torch.zeros(batch, shape.width, device=on)
        return MemoryState(S, prev, torch.zeros(batch, dtype=torch.int64, device=on))

    def forward(
        self, h: Tensor, state: MemoryState, mask: Tensor | None = None, *, trace: Trace | None = None
    ) -> tuple[dict[str, Tensor], MemoryState]:
        """Runs tokens: the delta of each head in use, {head: [B, T, width]}, and the memory after them.

        `h [B, T, H]` is what enters attention, after the input norm. `mask [B, T]` holds LIVE, FROZEN (reads, writes
        nothing) or PADDING (reads zero as well); without it every token is live. `trace` is filled with the
        intermediates of oracle.LayerTrace, [B, T, ...].
        """
        h = h.to(torch.float32)
        mask = torch.full(h.shape[:2], LIVE, device=h.device) if mask is None else mask.to(h.device)
        live = mask == LIVE
        s = self._source(h)
        before, prev = _time_shift(s, state.prev, live)
        beta, lam = self._gates(h)
        f = self._mix(s, before) | dict(zip(("keep", "erase", "write"), self._update_gates(beta, lam), strict=True))
        read, routes, S = scan(f, state.S, state.n, live, self.shape)
        read = read * (mask != PADDING)[..., None]
        out = self._project(read, f["g"])
        scale = self.shape.alpha / self.shape.rank
        deltas = {x: F.linear(out, self.get_parameter(f"delta_{x}_proj")) * scale for x in self.delta_heads}
        if trace is not None:
            features = {name: value for name, value in f.items() if name not in ("keep", "erase", "write")}
            trace |= {"s": s, "beta": beta, "lam": lam, **features, "raw_read": read, "routes": routes, "out": out}
            trace |= {f"delta_{x}": delta for x, delta in deltas.items()}
        return deltas, MemoryState(S, prev, state.n + live.sum(dim=1))

    def _source(self, h: Tensor) -> Tensor:
        s = F.linear(h, self.get_parameter("memory_v_proj"))
        return self._l2norm(torch.tanh(s), 1e-6) if self.shape.semantics == 2 else s

    def _gates(self, h: Tensor) -> tuple[Tensor, Tensor]:
        def gate(name: str) -> Tensor:
            x = torch.sigmoid(F.linear(h, self.get_parameter(f"{name}_proj"), self.get_parameter(f"{name}_bias")))
            return x if x.shape[-1] == self.shape.width else x.repeat_interleave(self.shape.rank, dim=-1)

        beta = gate("beta")
        return beta, 1 - beta if self.shape.couple_lambda else gate("lambda")

    def _mix(self, s: Tensor, before: Tensor) -> dict[str, Tensor]:
        """r w decay k v a b g, [B, T, D] each."""
        p = self.hrm_rwkv7_core.at
        x = {name: s + (before - s) * p(f"x_{name}") for name in "rwkvag"}
        w = -F.softplus(-(p("w0") + torch.tanh(x["w"] @ p("w1")) @ p("w2"))) - 0.5
        k0 = F.linear(x["k"], p("key.weight"))
        ag = torch.sigmoid(p("a0") + (x["a"] @ p("a1")) @ p("a2"))
        kk = self._l2norm(k0 * p("k_k"), 1e-12)
        return {
            "r": F.linear(x["r"], p("receptance.weight")),
            "w": w,
            "decay": torch.exp(-torch.exp(w)),
            "k": k0 * (1 + (ag - 1) * p("k_a")),
            "v": F.linear(x["v"], p("value.weight")),
            "a": -kk,
            "b": kk * ag,
            "g": torch.sigmoid(x["g"] @ p("g1")) @ p("g2"),
        }

    def _update_gates(self, beta: Tensor, lam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        one = torch.ones_like(beta)
        if self.shape.semantics == 2:
            return one, beta, beta
        keep, erase = {
            "standard": (lam, beta),
            "lambda_outside": (lam, lam * beta),
            "no_lambda": (one, beta),
        }[self.shape.update_mode]
        return keep, erase, beta

    def _project(self, read: Tensor, g: Tensor) -> Tensor:
        """Group norm (one group a head, no bias), gate, output projection."""
        p = self.hrm_rwkv7_core.at
        x = F.layer_norm(self._by_head(read), (self.shape.rank,), eps=64e-5).reshape(read.shape)
        return F.linear(x * p("ln_x.weight") * g, p("output.weight"))

    def _by_head(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:-1], self.shape.heads, self.shape.rank)

    def _l2norm(self, x: Tensor, eps: float) -> Tensor:
        return F.normalize(self._by_head(x), dim=-1, eps=eps).reshape(x.shape)


def scan(
    f: Mapping[str, Tensor], S: Tensor, n: Tensor, live: Tensor, shape: MemoryShape
) -> tuple[Tensor, Tensor, Tensor]:
    """Reads before it writes, token after token: reads [B, T, D], their weights [B, T, N, M], the states after all.

    `f` has FEATURES, [B, T, D] each; S [B, N, M, R, R], n [B] and live [B, T] are as MemoryState and `mask == LIVE`.
    """
    B, T = live.shape
    f = {name: f[name].reshape(B, T, shape.heads, shape.rank) for name in FEATURES}
    on = live[:, :, None, None]
    # S' = keep*decay*S + write*v k' + e*erase*(S a) b'; a token that writes nothing leaves S as it is, bit for bit
    kept = f["keep"][..., :, None] * f["decay"][..., None, :]
    kept = torch.where(on[..., None], kept, torch.ones_like(kept))
    added = torch.where(on, f["write"] * f["v"], 0.0)[..., :, None] * f["k"][..., None, :]
    erased = torch.where(on, shape.erase_gate * f["erase"], 0.0)[..., :, None] * f["b"][..., None, :]
    kept, added, a, erased = (x.transpose(0, 1) for x in (kept, added, f["a"], erased))  # tokens first

    written = n[:, None] + live.cumsum(dim=1) - live.long()  # tokens written before each token
    current = (written // shape.chunk) % shape.states  # [B, T]
    reads, routes = [], []
    for start, end in _runs(current):
        slot = current[:, start]
        mine = F.one_hot(slot, shape.states).bool()[:, None, :, None, None]  # [B, 1, M, 1, 1]
        state = S[torch.arange(B, device=S.device), :, slot]  # [B, N, R, R]
        run = slice(start, end)
        history, state = recurrence(state, kept[run], added[run], a[run], erased[run])
        r = f["r"][:, start:end]
        y = torch.einsum("bnmij,btnj->btnmi", S, r)
        y_mine = torch.einsum("tbnij,btnj->btni", history, r)
        y = torch.where(mine[:, None, ..., 0], y_mine[..., None, :], y)
        p = _routes(y, r, shape)
        reads.append(torch.einsum("btnm,btnmi->btni", p, y).reshape(B, end - start, -1))
        routes.append(p)
        S = torch.where(mine, state[:, :, None], S)
    return torch.cat(reads, dim=1), torch.cat(routes, dim=1), S


def _routes(y: Tensor, r: Tensor, shape: MemoryShape) -> Tensor:
    """The weights of the states, [B, T, N, M], of what each answers, y [B, T, N, M, R], to r [B, T, N, R]."""
    score = torch.einsum("btnmi,btni->btnm", y, r)
    if shape.semantics == 2:
        score = score / (_clamped_norm(y) * _clamped_norm(r)[..., None])
    else:
        score = score / shape.rank**0.5
    return torch.softmax(score, dim=-1)


def _clamped_norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1).clamp_min(1e-6)


def _time_shift(s: Tensor, prev: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    """For each token the source of the last written token before it [B, T, D], and that after all tokens [B, D]."""
    table = torch.cat([prev[:, None], s], dim=1)
    index = torch.arange(1, s.shape[1] + 1, device=s.device) * live
    last = F.pad(index, (1, 0)).cummax(dim=1).values
    shifted = table.gather(1, last[..., None].expand(-1, -1, s.shape[-1]))
    return shifted[:, :-1], shifted[:, -1]


def _runs(current: Tensor) -> list[tuple[int, int]]:
    """Pieces of the token axis within which no sequence goes on to its next state."""
    T = current.shape[1]
    turns = (current[:, 1:] != current[:, :-1]).any(dim=0).nonzero().flatten().tolist()
    edges = [0, *(turn + 1 for turn in turns), T]
    return [(a, b) for a, b in pairwise(edges) if b > a]


@torch.no_grad()
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
    """Runs T tokens of one sequence through this implementation; arguments and result as oracle.eval_layer has them."""

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.array(array, np.float32))[None]

    given = features if h is None else h
    assert given is not None, "either h or features"
    n_tokens = len(given)
    marks = torch.from_numpy(np.zeros(n_tokens, np.int64) if mask is None else np.array(mask, np.int64))[None]
    matrices = tensor(S).reshape(1, shape.heads, shape.states, shape.rank, shape.rank)
    if features is not None:
        columns = tensor(features).reshape(1, n_tokens, len(FEATURES), shape.width).unbind(dim=2)
        f = dict(zip(FEATURES, columns, strict=True))
        read, routes, final = scan(f, matrices, torch.tensor([n_past]), marks == LIVE, shape)
        on = (marks != PADDING)[..., None]
        trace = {"raw_read": read * on, "routes": routes * on[..., None], "final_S": final}
        trace["final_pos"] = n_past + (marks == LIVE).sum(dim=1)
    else:
        assert weights is not None and h is not None and prev is not None, "weights need h and prev"
        trace = {}
        before = MemoryState(matrices, tensor(prev).reshape(1, -1), torch.tensor([n_past]))
        _, after = from_weights(weights, shape)(tensor(h), before, marks, trace=trace)
        trace |= {"final_S": after.S, "final_prev": after.prev, "final_pos": after.n}
    return {name: value[0].numpy() for name, value in trace.items()}


def from_weights(
    weights: Mapping[str, np.ndarray], shape: MemoryShape, delta_heads: tuple[str, ...] | None = None
) -> Memory:
    """A memory of tensors by sidecar short name, as Sidecar.weights has them; None: heads with a tensor are in use.

    Raises KeyError for a tensor that is missing or of another shape.
    """
    widths = {head: len(weights[f"delta_{head}"]) for head in HEADS if f"delta_{head}" in weights}
    memory = Memory(
        shape,
        widths,
        tuple(widths) if delta_heads is None else delta_heads,
        lora=weights["rwkv.w1"].shape[-1],
        rankwise_gates=len(weights["beta"]) == shape.width,
    )
    for name, parameter in memory.named_parameters():
        short = short_name(f"model.language_model.layers.0.self_attn.{name}").removeprefix("blk.0.")
        if short in weights or short not in ("mem_q", "mem_k"):  # those two are of other backends
            given = torch.from_numpy(np.array(weights[short], np.float32))
            if given.shape != parameter.shape:
                raise KeyError(f"{short} is {list(given.shape)}, must be {list(parameter.shape)}")
            parameter.data.copy_(given)
    return memory
