"""One memory layer, driven in process by the compiled op."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import numpy as np

from llamamem.errors import LlamamemError
from llamamem.native.bindings import N_ERR, AdapterMemEvalParams, Library, floats, loaded_library
from llamamem.reference.oracle import FEATURES, HEADS, UPDATE_MODES, LayerTrace, MemoryShape

__all__ = ["eval_layer"]

# names in the C trace, in the order of its columns [13*D + N*M]
_TRACE = ("s", "beta", "lam", "r", "w", "decay", "k", "v", "a", "b", "g", "raw_read", "out")


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
    library: Library | None = None,
) -> LayerTrace:
    """Runs T tokens through one layer with the compiled op; arguments and result as `oracle.eval_layer` has them."""
    library = library or loaded_library()
    if (features is None) == (weights is None or h is None):
        raise LlamamemError("a layer runs either on weights with h or on features")
    tensors = {} if weights is None else {k: np.ascontiguousarray(v, np.float32) for k, v in weights.items()}
    source = np.ascontiguousarray(h if features is None else features, np.float32)
    n_tokens, width = len(source), shape.width
    expected = shape.hidden if features is None else len(FEATURES) * width
    if source.shape != (n_tokens, expected):
        raise LlamamemError(f"the layer's input has shape {list(source.shape)}, expected [T, {expected}]")
    S = np.array(S, np.float32).reshape(shape.heads, shape.states, shape.rank, shape.rank)
    prev = np.zeros(width, np.float32) if prev is None else np.array(prev, np.float32).reshape(width)
    n_written = ctypes.c_int64(n_past)
    masks = None if mask is None else np.ascontiguousarray(mask, np.int32)
    trace = np.zeros((n_tokens, len(_TRACE) * width + shape.heads * shape.states), np.float32)
    deltas = {
        head: np.zeros((n_tokens, len(tensors[f"delta_{head}"])), np.float32)
        for head in HEADS
        if features is None and f"delta_{head}" in tensors
    }
    # torch shape, 1 for the second size of a vector
    ne = np.array([(*t.shape, 1)[:2] for t in tensors.values()], np.int64).reshape(-1, 2)
    float_p = ctypes.POINTER(ctypes.c_float)
    params = AdapterMemEvalParams(
        n_embd=shape.hidden,
        rank=shape.rank,
        n_head=shape.heads,
        n_state=shape.states,
        n_chunk=shape.chunk,
        semantics=shape.semantics,
        alpha=shape.alpha,
        erase_gate=shape.erase_gate,
        update_mode=UPDATE_MODES.index(shape.update_mode),
        couple_lambda=shape.couple_lambda,
        n_tensors=len(tensors),
        names=(ctypes.c_char_p * len(tensors))(*(name.encode() for name in tensors)),
        data=(float_p * len(tensors))(*(floats(t) for t in tensors.values())),
        ne=ne.ctypes.data_as(ctypes.POINTER(ctypes.c_int64)),
        n_tokens=n_tokens,
        h=floats(source) if features is None else None,
        features=None if features is None else floats(source),
        mask=None if masks is None else masks.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
        S=floats(S),
        prev=floats(prev),
        n_past=ctypes.pointer(n_written),
        trace=floats(trace),
        delta=(float_p * 4)(*(floats(deltas[x]) if x in deltas else float_p() for x in HEADS)),
    )
    err = ctypes.create_string_buffer(N_ERR)
    if not library.function("llama_adapter_mem_eval")(ctypes.byref(params), err, N_ERR):
        raise LlamamemError(err.value.decode("utf-8", "replace"))

    result: LayerTrace = {"final_S": S, "final_pos": np.array(n_written.value)}
    columns = {name: trace[:, i * width : (i + 1) * width] for i, name in enumerate(_TRACE)}
    result["routes"] = trace[:, len(_TRACE) * width :].reshape(n_tokens, shape.heads, shape.states)
    if features is not None:
        return {**result, "raw_read": columns["raw_read"]}
    return {**result, **columns, "final_prev": prev, **{f"delta_{head}": d for head, d in deltas.items()}}
