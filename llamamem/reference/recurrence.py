"""The writes of the memory's scan as one differentiable operation.

Autograd over a loop of tokens costs more than the tokens. Here the loop runs twice, once forward over the states and
once backward over their gradients, and all the rest is done for every token at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def recurrence(S: Tensor, kept: Tensor, added: Tensor, a: Tensor, erased: Tensor) -> tuple[Tensor, Tensor]:
    """The states before each token, [T, ..., R, R], and the one after all, of S' = kept*S + added + (S a) erased.

    S [..., R, R] is the first one; kept, added and erased [T, ..., R, R] are by row and column of it, a [T, ..., R] by
    column. T is at least 1.
    """
    history, last = _Recurrence.apply(S, kept, added, a, erased)
    return history, last


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, S: Tensor, kept: Tensor, added: Tensor, a: Tensor, erased: Tensor) -> tuple[Tensor, Tensor]:
        history = kept.new_empty(kept.shape)
        state = S
        for keep, add, key, erase, before in zip(kept, added, a, erased, history, strict=True):
            before.copy_(state)
            answer = torch.matmul(state, key[..., None])
            state = torch.addcmul(torch.addcmul(add, state, keep), answer, erase)
        ctx.save_for_backward(history, kept, a, erased)
        return history, state

    @staticmethod
    def backward(ctx: Any, from_history: Tensor, from_last: Tensor) -> tuple[Tensor, ...]:
        history, kept, a, erased = ctx.saved_tensors
        after = torch.empty_like(history)  # the gradient of the state after each token
        G = from_last
        for t in range(len(history) - 1, -1, -1):
            after[t] = G
            of_answer = (G * erased[t]).sum(-1, keepdim=True)
            G = torch.addcmul(torch.addcmul(from_history[t], G, kept[t]), of_answer, a[t][..., None, :])
        of_answer = (after * erased).sum(-1, keepdim=True)
        answer = torch.matmul(history, a[..., None])
        return G, after * history, after, (of_answer * history).sum(-2), after * answer
