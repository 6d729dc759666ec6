"""What tests of quantised bases run in a process of its own, libllama without PyTorch; and how ggml rounds."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np


def native_memory(base: Path, sidecar: Path, ids: list[int]) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """S [layers, N, M, R, R], prev [layers, N*R] and the tokens written, after the ids went through in one batch."""
    from llamamem.native.runtime import Context, Model, load_library

    load_library()
    with Model.open(base, sidecar) as model, Context(model, 256) as context:
        context.decode(np.array(ids))
        states = context.states()
    return np.stack([s.S for s in states]), np.stack([s.prev for s in states]), [s.n for s in states]


def native_logits(base: Path, texts: list[str], n: int) -> tuple[list[list[int]], np.ndarray]:
    """The ids of each text, what looks like a special token being one; the logits [n, V] of the last one's first n."""
    from llamamem.native.runtime import Context, Model, load_library

    api = load_library().api
    with Model.open(base) as model, Context(model, 256) as context:
        vocabulary, found = api.llama_model_get_vocab(model.handle), []
        for text in texts:
            data, ids = text.encode(), (ctypes.c_int32 * 512)()
            found.append(ids[: api.llama_tokenize(vocabulary, data, len(data), ids, 512, False, True)])
        return found, context.decode(np.array(found[-1][:n]))


def to_q8(x: Any) -> Any:
    """ggml's Q8_0 of activations in PyTorch, and its Q8_1 but for sums: 32 to a scale, which is F16."""
    import torch

    blocks = x.reshape(-1, 32)
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    steps = torch.where(scale > 0, blocks / scale, 0.0)
    return (torch.floor(steps.abs() + 0.5) * steps.sign() * scale.half().float()).reshape(x.shape)
