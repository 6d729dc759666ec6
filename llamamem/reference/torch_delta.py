"""One delta-rule memory layer in PyTorch: differentiable, batched, the same maths as its NumPy oracle.

Shapes as in torch_memory; a state is kept as that of RWKV-MS with M = 1 and no previous source, the counter is for
people. Everything is fp32, whatever the type of `h`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llamamem.formats.sidecar import short_name
from llamamem.formats.sidecar.layout import SOURCE_PREFIX
from llamamem.reference.delta_oracle import DeltaShape
from llamamem.reference.oracle import HEADS, LIVE, PADDING, LayerTrace
from llamamem.reference.recurrence import recurrence
from llamamem.reference.torch_memory import MemoryState, Trace, add_projections

__all__ = ["DeltaMemory", "eval_layer", "from_weights"]

_EPS = 1e-6  # of the norm of q and k


class DeltaMemory(nn.Module):
    """The memory beside one attention layer.

    Its parameters are named as in a checkpoint, behind `model.layers.{L}.self_attn.`; a new one is all zeros and adds
    nothing. `widths` has the output width of each head's projection in the base. `scales`: 0, or how many entries a
    trained scale has, 1 or 4.
    """

    def __init__(
        self,
        shape: DeltaShape,
        widths: Mapping[str, int],
        delta_heads: tuple[str, ...] = ("q", "o"),
        *,
        rankwise_gates: bool = True,
        scales: int = 0,
        o_rmsnorm: bool = False,
    ):
        super().__init__()
        self.shape = shape
        self.delta_heads = delta_heads
        add_projections(self, shape, widths, rankwise_gates)
        if scales:
            self.delta_scale_raw = nn.Parameter(torch.zeros(scales))
        if o_rmsnorm:
            self.delta_o_rmsnorm_weight = nn.Parameter(torch.ones(widths["o"]))

    def fresh(self, batch: int = 1) -> MemoryState:
        """The empty memory of `batch` sequences."""
        shape, on = self.shape, next(self.parameters()).device
        S = torch.zeros(batch, shape.heads, 1, shape.rank, shape.rank, device=on)
        return MemoryState(S, torch.zeros(batch, 0, device=on), torch.zeros(batch, dtype=torch.int64, device=on))

    def forward(
        self, h: Tensor, state: MemoryState, mask: Tensor | None = None, *, trace: Trace | None = None
    ) -> tuple[dict[str, Tensor], MemoryState]:
        """Runs tokens, as torch_memory.Memory.forward does; `trace` is filled with what its oracle returns."""
        h = h.to(torch.float32)
        mask = torch.full(h.shape[:2], LIVE, device=h.device) if mask is None else mask.to(h.device)
        live = mask == LIVE
        f = self._features(h)
        read, S = self._scan(f, state.S[:, :, 0], live)
        read = read * (mask != PADDING)[..., None]
        deltas = {head: self._delta(head, read) for head in self.delta_heads}
        if trace is not None:
            trace |= {**f, "raw_read": read, **{f"delta_{head}": delta for head, delta in deltas.items()}}
        return deltas, MemoryState(S[:, :, None], state.prev, state.n + live.sum(dim=1))

    def _features(self, h: Tensor) -> dict[str, Tensor]:
        """q k v beta lam, [B, T, D] each."""

        def project(name: str) -> Tensor:
            return F.linear(h, self.get_parameter(f"memory_{name}_proj"))

        def address(name: str) -> Tensor:
            x = project(name)
            return F.normalize(self._by_head(torch.tanh(x)), dim=-1, eps=_EPS).flatten(-2) if normalize else x

        def gate(name: str) -> Tensor:
            x = torch.sigmoid(F.linear(h, self.get_parameter(f"{name}_proj"), self.get_parameter(f"{name}_bias")))
            return x if x.shape[-1] == self.shape.width else x.repeat_interleave(self.shape.rank, dim=-1)

        normalize, beta = self.shape.normalize_qk, gate("beta")
        if self.shape.update_mode == "no_lambda":
            lam = torch.ones_like(beta)
        else:
            lam = 1 - beta if self.shape.couple_lambda else gate("lambda")
        return {"q": address("q"), "k": address("k"), "v": project("v"), "beta": beta, "lam": lam}

    def _scan(self, f: Mapping[str, Tensor], S: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
        """Reads before it writes: reads [B, T, D] and the states [B, N, R, R] after all tokens."""
        q, k, v, beta, lam = (self._by_head(f[name]) for name in ("q", "k", "v", "beta", "lam"))
        on = live[:, :, None, None]
        erase = lam * beta if self.shape.update_mode == "lambda_outside" else beta
        # a token that writes nothing leaves S as it is, bit for bit
        kept = torch.where(on, lam, 1.0)[..., None].expand(*k.shape, k.shape[-1])
        added = torch.where(on, beta * v, 0.0)[..., None] * k[..., None, :]
        erased = torch.where(on, -erase, 0.0)[..., None] * k[..., None, :]
        history, S = recurrence(S, *(x.transpose(0, 1) for x in (kept, added, k, erased)))
        return torch.einsum("tbnij,btnj->btni", history, q).flatten(-2), S

    def _delta(self, head: str, read: Tensor) -> Tensor:
        scale = self.shape.alpha / self.shape.rank
        out = F.linear(read, self.get_parameter(f"delta_{head}_proj")) * scale
        if hasattr(self, "delta_scale_raw"):
            scales = self.shape.scale_max * torch.sigmoid(self.delta_scale_raw)
            out = out * scales[HEADS.index(head) if len(scales) > 1 else 0]
        if head == "o" and hasattr(self, "delta_o_rmsnorm_weight"):
            out = F.rms_norm(out, out.shape[-1:], self.delta_o_rmsnorm_weight, self.shape.o_rmsnorm_eps)
        return out

    def _by_head(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.shape.heads, self.shape.rank))


def from_weights(
    weights: Mapping[str, np.ndarray], shape: DeltaShape, delta_heads: tuple[str, ...] | None = None
) -> DeltaMemory:
    """A memory of tensors by sidecar short name; None: heads with a tensor are in use.

    Raises KeyError for a tensor that is missing or of another shape.
    """
    widths = {head: len(weights[f"delta_{head}"]) for head in HEADS if f"delta_{head}" in weights}
    memory = DeltaMemory(
        shape,
        widths,
        tuple(widths) if delta_heads is None else delta_heads,
        rankwise_gates=len(weights["beta"]) == shape.width,
        scales=len(weights["delta_scale"]) if "delta_scale" in weights else 0,
        o_rmsnorm="delta_o_norm" in weights,
    )
    for name, parameter in memory.named_parameters():
        short = short_name(f"{SOURCE_PREFIX}0.self_attn.{name}", True).removeprefix("blk.0.")
        given = torch.from_numpy(np.array(weights[short], np.float32))
        if given.shape != parameter.shape:
            raise KeyError(f"{short} is {list(given.shape)}, must be {list(parameter.shape)}")
        parameter.data.copy_(given)
    return memory


@torch.no_grad()
def eval_layer(
    weights: Mapping[str, np.ndarray],
    *,
    h: np.ndarray,
    S: np.ndarray,
    shape: DeltaShape,
    mask: np.ndarray | None = None,
    n_past: int = 0,
) -> LayerTrace:
    """Runs T tokens of one sequence; arguments and result as delta_oracle.eval_layer has them."""
    start = torch.from_numpy(np.array(S, np.float32)).reshape(1, shape.heads, 1, shape.rank, shape.rank)
    marks = None if mask is None else torch.from_numpy(np.array(mask, np.int64))[None]
    trace: Trace = {}
    memory = from_weights(weights, shape)
    before = MemoryState(start, torch.zeros(1, 0), torch.tensor([n_past]))
    _, after = memory(torch.from_numpy(np.array(h, np.float32))[None], before, marks, trace=trace)
    return {name: value[0].numpy() for name, value in trace.items()} | {
        "final_S": after.S[0, :, 0].numpy(),
        "final_pos": after.n[0].numpy(),
    }
