"""The models of the MQAR comparison: one shell, and a mixer for each arm in it.

Two pre-norm blocks, no MLP, no position embedding, embedding and head tied. The first block is a gated convolution of
3 tokens, the second is the arm's mixer with a causal short convolution of 4 tokens, which every arm has. The arm
`rwkv-ms` is the reference's own Memory, from its input to its delta, with the start that `llamamem train` gives it.

B sequences, T tokens, d model width, N heads, R = d / N head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llamamem.lab.mqar_plan import Mixer
from llamamem.lab.mqar_recurrence import read_after_write
from llamamem.reference.oracle import MemoryShape
from llamamem.reference.torch_memory import Memory
from llamamem.reference.trainable import start_memory

_EMBEDDING_INIT = 0.02
_W0 = -5.0  # of the full RWKV-7: 0.4 % of the state decays with each token, at first


class Mqar(nn.Module):
    """tokens [B, T] -> logits [B, T, V]."""

    def __init__(self, mixer: Mixer, vocab: int, *, init: float, dropout: float = 0.0):
        super().__init__()
        d = mixer.width
        self.embed = nn.Embedding(vocab, d)
        self.dropout = dropout
        self.norms = nn.ModuleList(nn.LayerNorm(d) for _ in range(3))
        self.gated, self.gated_conv = _linear(d, d, 0.0), ShortConv(d, 3)
        nn.init.normal_(self.embed.weight, std=_EMBEDDING_INIT)
        self.mixer = MIXERS[mixer.arm](mixer)
        for linear in self.modules():
            if isinstance(linear, nn.Linear):  # the memory that ships has none, and a start of its own
                nn.init.normal_(linear.weight, std=init)

    def forward(self, tokens: Tensor, at: Tensor | None = None) -> Tensor:
        """`at [B, T]`, if given, says where logits are wanted: [number of those, V]."""
        x = F.dropout(self.embed(tokens), self.dropout, self.training)
        u = self.norms[0](x)
        x = x + self.gated_conv(u) * self.gated(u) + u
        x = x + self.mixer(self.norms[1](x))
        x = self.norms[2](x if at is None else x[at])
        return x @ self.embed.weight.T


class ShortConv(nn.Module):
    """A causal convolution of each channel with itself: [B, T, C] -> [B, T, C]."""

    def __init__(self, channels: int, size: int):
        super().__init__()
        bound = size**-0.5
        self.taps = nn.Parameter(torch.empty(size, channels).uniform_(-bound, bound))  # the last is of this token

    def forward(self, x: Tensor) -> Tensor:
        size = len(self.taps)
        T = x.shape[1]
        padded = F.pad(x, (0, 0, size - 1, 0))
        y = padded[:, :T] * self.taps[0]
        for i in range(1, size):
            y = torch.addcmul(y, padded[:, i : i + T], self.taps[i])
        return y


class _Projected(nn.Module):
    """q, k and v by head, behind the short convolution; the read, normed by head, goes through the output map."""

    def __init__(self, mixer: Mixer):
        super().__init__()
        d = mixer.width
        self.shape = (mixer.heads, mixer.head)
        self.qkv, self.conv = nn.Linear(d, 3 * d, bias=False), ShortConv(3 * d, 4)
        self.norm = nn.Parameter(torch.ones(d))
        self.out = nn.Linear(d, d, bias=False)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = F.silu(self.conv(self.qkv(x))).chunk(3, dim=-1)
        return self.by_head(q), self.by_head(k), self.by_head(v)

    def by_head(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, self.shape)

    def answer(self, read: Tensor) -> Tensor:
        """[B, T, N, R] -> [B, T, d]."""
        x = read * torch.rsqrt(read.square().mean(dim=-1, keepdim=True) + 1e-5)
        return self.out(x.flatten(-2) * self.norm)


class DeltaRule(_Projected):
    """DeltaNet: S' = S - (S bk) k' + (bv) k', where the beta b is one number a head, or one a channel.

    As a vector it stands on the key within S and on the value, which is what a delta rule becomes when it is written
    with the kernel of RWKV-7.
    """

    def __init__(self, mixer: Mixer):
        super().__init__(mixer)
        self.vector = mixer.arm == "vector-beta"
        self.beta = _linear(mixer.width, mixer.width if self.vector else mixer.heads, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        beta = torch.sigmoid(self.beta(x))
        beta = self.by_head(beta) if self.vector else beta[..., None]
        return self.answer(read_after_write(q, None, k, beta * v, -beta * k, k))


class Rwkv7(_Projected):
    """The whole update of RWKV-7 (arXiv 2503.14456): S' = S diag(w) + (S -kk) (kk a)' + v k', w and a learned."""

    def __init__(self, mixer: Mixer):
        super().__init__(mixer)
        d = mixer.width
        self.w, self.a = _linear(d, d, _W0), _linear(d, d, 0.0)
        self.k_k, self.k_a = nn.Parameter(torch.ones(d)), nn.Parameter(torch.ones(d))

    def forward(self, x: Tensor) -> Tensor:
        r, k, v = self.heads(x)
        a = self.by_head(torch.sigmoid(self.a(x)))
        decay = self.by_head(torch.exp(-torch.exp(-F.softplus(-self.w(x)) - 0.5)))
        kk = F.normalize(k * self.by_head(self.k_k), dim=-1)
        k = k * (1 + (a - 1) * self.by_head(self.k_a))
        return self.answer(read_after_write(r, decay, k, v, -kk, kk * a))


class Attention(_Projected):
    """Softmax attention over all tokens up to this one."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.transpose(1, 2) for part in self.heads(x))
        return self.answer(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2))


class RwkvMs(nn.Module):
    """The memory that ships, from its input to its delta: it reads before it writes, and has several states."""

    def __init__(self, mixer: Mixer):
        super().__init__()
        d = mixer.width
        shape = MemoryShape(d, mixer.head, mixer.heads, mixer.states, mixer.chunk, alpha=2.0 * mixer.head)
        self.conv = ShortConv(d, 4)
        self.memory = Memory(shape, {"o": d}, ("o",))
        generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
        start_memory(self.memory, generator)
        for name in ("memory_q_proj", "memory_k_proj"):  # of other backends: nothing reads them
            self.memory.get_parameter(name).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        deltas, _ = self.memory(x + self.conv(x), self.memory.fresh(len(x)))
        return deltas["o"]


MIXERS: dict[str, Any] = {
    "scalar-beta": DeltaRule,
    "vector-beta": DeltaRule,
    "rwkv7": Rwkv7,
    "rwkv-ms": RwkvMs,
    "attention": Attention,
}


def _linear(inputs: int, outputs: int, bias: float) -> nn.Linear:
    linear = nn.Linear(inputs, outputs)
    nn.init.constant_(linear.bias, bias)
    return linear


def parameters(model: nn.Module) -> int:
    """How many numbers are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
