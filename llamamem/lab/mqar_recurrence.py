"""The same recurrence as llamamem.reference.recurrence, for updates whose parts are outer products.

The memory that ships needs a rate for each number of its state, and its scan takes whole matrices. The arms that it is
compared with do not: here nothing but the states themselves is kept by matrix, which halves the time of a step. Tests
hold it, and its gradients, to the reference's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def read_after_write(q: Tensor, decay: Tensor | None, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """y_t = S_t q_t of S_t = S_(t-1) diag(decay_t) + v_t k_t' + (S_(t-1) a_t) b_t' from S = 0, all [B, T, N, R]."""
    B, T, N, R = q.shape
    first = [None if x is None else x.transpose(0, 1).reshape(T, B * N, R) for x in (q, decay, k, v, a, b)]
    return _ReadAfterWrite.apply(*first).reshape(T, B, N, R).transpose(0, 1)


class _ReadAfterWrite(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, decay: Tensor | None, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        T, M, R = q.shape
        states = q.new_empty(T + 1, M, R, R)  # before each token, and after the last
        states[0] = 0.0
        answers = q.new_empty(T, M, R, 1)
        for t in range(T):
            torch.bmm(states[t], a[t, :, :, None], out=answers[t])
            kept = states[t] if decay is None else states[t] * decay[t, :, None]
            torch.addcmul(kept, v[t, :, :, None], k[t, :, None], out=states[t + 1])
            states[t + 1].addcmul_(answers[t], b[t, :, None])
        ctx.save_for_backward(q, decay, k, v, a, b, states, answers)
        return torch.matmul(states[1:], q[..., None])[..., 0]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, decay, k, v, a, b, states, answers = ctx.saved_tensors
        T = len(q)
        of_states = torch.empty_like(states[1:])  # the gradient of the state after each token
        of_answers = torch.empty_like(answers)
        later = torch.zeros_like(states[0])
        for t in range(T - 1, -1, -1):
            torch.addcmul(later, dy[t, :, :, None], q[t, :, None], out=of_states[t])
            torch.bmm(of_states[t], b[t, :, :, None], out=of_answers[t])
            kept = of_states[t] if decay is None else of_states[t] * decay[t, :, None]
            later = torch.addcmul(kept, of_answers[t], a[t, :, None])
        before, across = states[:-1], of_states.transpose(-1, -2)
        of_key_and_b = torch.matmul(across, torch.cat([v[..., None], answers], dim=-1))
        return (
            torch.matmul(states[1:].transpose(-1, -2), dy[..., None])[..., 0],
            None if decay is None else (of_states * before).sum(-2),
            of_key_and_b[..., 0],
            torch.matmul(of_states, k[..., None])[..., 0],
            torch.matmul(before.transpose(-1, -2), of_answers)[..., 0],
            of_key_and_b[..., 1],
        )
