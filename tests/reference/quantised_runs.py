"""What a process of its own runs for test_quantised_memory.py: libllama, without PyTorch beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def native_memory(base: Path, sidecar: Path, ids: list[int]) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """S [layers, N, M, R, R], prev [layers, N*R] and the tokens written, after the ids went through in one batch."""
    from llamamem.native.runtime import Context, Model, load_library

    load_library()
    with Model.open(base, sidecar) as model, Context(model, 256) as context:
        context.decode(np.array(ids))
        states = context.states()
    return np.stack([s.S for s in states]), np.stack([s.prev for s in states]), [s.n for s in states]
