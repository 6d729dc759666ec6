"""Writes a reference trace: what the reference answered to one prompt, and what its memory did at every token.

Schema `delta_mem_rwkv_ms_reference_trace.v1`, as llamamem.formats.trace reads it; `steps` and `reference` are ours.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers

import llamamem
from llamamem.formats.trace import SCHEMA
from llamamem.reference.attach import Attached
from llamamem.reference.base import Base
from llamamem.reference.conversation import Conversation


def record_trace(
    base: Base, memory: Attached, prompt: str, max_new_tokens: int, *, top: int = 5, adapter: str = ""
) -> dict[str, Any]:
    """Answers `prompt`, a user's turn, greedily on an empty memory, one token a pass, and says what happened.

    Each of `steps` has the token, the `top` tokens that may come next with their logits, and for each target layer the
    L2 norms of its deltas and what the memory is after the token: norms of the matrices, of the source, the counter.
    """
    conversation = Conversation(base, memory)
    prompt_ids = base.prompt([{"role": "user", "content": prompt}])
    memory.norms = []
    steps: list[dict[str, Any]] = []
    new: list[int] = []
    queue = list(prompt_ids)
    while queue:
        token = queue.pop(0)
        logits = conversation.feed([token])[-1]
        steps.append(_step(base, memory, len(steps), token, logits, top, is_new=len(steps) >= len(prompt_ids)))
        if not queue and len(new) < max_new_tokens and not (new and new[-1] in base.stop):
            new.append(int(logits.argmax()))
            # the last one is chosen and goes through no more, as in the server
            if len(new) < max_new_tokens and new[-1] not in base.stop:
                queue.append(new[-1])
    memory.norms = None
    stopped = bool(new) and new[-1] in base.stop
    return {
        "schema": SCHEMA,
        "generation": {
            "prompt": prompt,
            "max_new_tokens": max_new_tokens,
            "do_sample": False,
            "sample_seed": None,
            "temperature": None,
            "top_p": None,
            "top_k": None,
        },
        "result": {"assistant_display": base.text(new[:-1] if stopped else new), "stopped": stopped},
        "session": {
            "processed_input_ids": list(conversation.tokens),
            "prompt_ids": prompt_ids,
            "new_ids": new,
        },
        "reference": _about(base, memory, adapter),
        "steps": steps,
    }


def _step(
    base: Base, memory: Attached, i: int, token: int, logits: torch.Tensor, top: int, *, is_new: bool
) -> dict[str, Any]:
    best = logits.topk(min(top, len(logits)))
    norms = memory.norms.pop() if memory.norms else {}
    layers = {}
    for layer, state in memory.state.items():
        layers[str(layer)] = {
            "deltas": {head: round(float(norm[0, -1]), 6) for head, norm in norms.get(layer, {}).items()},
            "S": [[round(x, 6) for x in head] for head in state.S[0].flatten(-2).norm(dim=-1).tolist()],
            "prev": round(float(state.prev[0].norm()), 6),
            "tokens_written": int(state.n[0]),
        }
    return {
        "index": i,
        "token": token,
        "text": base.tokenizer.convert_ids_to_tokens(token),
        "from": "model" if is_new else "prompt",
        "top": [[int(t), round(float(x), 5)] for x, t in zip(best.values, best.indices, strict=True)],
        "layers": layers,
    }


def _about(base: Base, memory: Attached, adapter: str) -> dict[str, Any]:
    identity, shape = memory.adapter.identity, memory.adapter.shape
    return {
        "llamamem": llamamem.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "base": base.name,
        "dtype": str(next(base.model.parameters()).dtype).removeprefix("torch."),
        "gelu": base.gelu,
        "adapter": adapter,
        "sidecar_sha256": identity.sidecar_sha256 if identity else None,
        "base_sha256": identity.base_sha256 if identity else None,
        "layers": list(memory.adapter.layers),
        "semantics": shape.semantics,
        "rank": shape.rank,
        "states": shape.states,
        "chunk": shape.chunk,
        "alpha": shape.alpha,
    }
