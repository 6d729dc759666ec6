"""Arithmetic on memories: what is in one, how far two are apart, and new ones made of old ones.

All of it is on the memory of one sequence. Two states go together only when they belong to the same sidecar and base:
the numbers of one mean nothing to another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from llamamem.errors import LlamamemError
from llamamem.formats.state.block import KINDS, MADE_BY_TOOL, MEMORY, SEQUENCE
from llamamem.formats.state.file import State, encode_state


@dataclass(frozen=True)
class LayerDiff:
    """How far the memories of one target layer are apart; norms are those of all its matrices together (L2)."""

    layer: int  # among the target layers, from 0
    l2: float
    relative: float  # l2 over the larger of both norms: 0 the same, 2 opposite; 0 where both are zero
    cosine: float | None  # None where one is zero
    max_abs: float
    prev_l2: float  # of the sources for the time shift
    tokens: int  # tokens written: b's less a's


def diff(a: State, b: State) -> list[LayerDiff]:
    """Distances from a to b, layer by layer. Raises LlamamemError when they do not go together."""
    _check_pair(a, b)
    return [_layer_diff(a, b, layer) for layer in range(a.layers)]


def same(a: State, b: State) -> bool:
    """Whether both memories, sources and counters are equal in every bit but the sign of a zero."""
    _check_pair(a, b)
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("S", "prev", "tokens_written"))


def blend(a: State, b: State, alpha: float) -> State:
    """(1 - alpha) * a + alpha * b, of the matrices and of the source of the last token; alpha from 0 to 1.

    The counter is a's: a is the conversation that goes on, b is mixed into it. A counter in between would put the write
    into a matrix that neither would have written to next, and of two counters a mean has no meaning modulo M*C.
    """
    _check_pair(a, b)
    _check_number("alpha", alpha)
    return replace(
        _made(a, f"blend alpha={float(alpha)!r} a={_name(a)} b={_name(b)}"),
        S=_mix(a.S, b.S, alpha),
        prev=_mix(a.prev, b.prev, alpha),
    )


def decay(a: State, factor: float) -> State:
    """factor * a, of the matrices alone; factor from 0 (forgotten) to 1.

    The source of the last token and the counter stay: they say where the conversation stands, not what it remembers.
    """
    _check_one(a)
    _check_number("factor", factor)
    zeros = np.zeros_like(a.S)
    return replace(_made(a, f"decay factor={float(factor)!r} a={_name(a)}"), S=_mix(zeros, a.S, factor))


def norms(state: State) -> tuple[np.ndarray, np.ndarray]:
    """Frobenius norm and largest absolute value of every matrix, each f64 [cells, layers, N, M]."""
    magnitude = np.abs(state.S.astype(np.float64))
    return np.sqrt((magnitude**2).sum((-2, -1))), magnitude.max((-2, -1))


def describe(state: State, layers: Sequence[int] | None = None) -> dict[str, Any]:
    """What a state is and holds, for JSON. `layers`: the base's numbers of the target layers, None where not known."""
    norm, largest = norms(state)
    numbers: Sequence[int | None] = layers or [None] * state.layers
    return {
        "path": str(state.path),
        "bytes": state.size,
        "sha256": state.sha256,
        "kind": KINDS[state.kind],
        "memory_kind": state.memory_kind,
        "tokens": len(state.token_ids),
        "kv_bytes": state.kv_bytes,
        "architecture": state.architecture or None,
        "sidecar_sha256": state.sidecar_sha256,
        "base_sha256": state.base_sha256,
        "fingerprint": state.fingerprint,
        "made_by_tool": state.made_by_tool,
        "provenance": state.provenance,
        **{name: getattr(state, name) for name in ("layers", "heads", "states", "rank", "chunk", "semantics")},
        "sequences": [
            {
                "tokens_written": int(state.tokens_written[cell].max()),
                "current_chunk": int(state.current_chunk[cell].max()),
                "current_state": int(state.current_state[cell, state.tokens_written[cell].argmax()]),
                "origin_tokens": None if state.origin_tokens is None else int(state.origin_tokens[cell].max()),
                "layers": [
                    {
                        "target_layer": layer,
                        "base_layer": numbers[layer],
                        "tokens_written": int(state.tokens_written[cell, layer]),
                        "current_state": int(state.current_state[cell, layer]),
                        "norm": float(np.linalg.norm(norm[cell, layer])),
                        "max_abs": float(largest[cell, layer].max()),
                        "prev_norm": float(np.linalg.norm(state.prev[cell, layer].astype(np.float64))),
                        "states": [
                            {
                                "head": head,
                                "state": m,
                                "norm": float(norm[cell, layer, head, m]),
                                "max_abs": float(largest[cell, layer, head, m]),
                                "live": bool(largest[cell, layer, head, m] > 0),
                            }
                            for head in range(state.heads)
                            for m in range(state.states)
                        ],
                    }
                    for layer in range(state.layers)
                ],
            }
            for cell in range(state.cells)
        ],
    }


def _layer_diff(a: State, b: State, layer: int) -> LayerDiff:
    x, y = (state.S[0, layer].astype(np.float64).ravel() for state in (a, b))
    prev = b.prev[0, layer].astype(np.float64) - a.prev[0, layer]
    distance, of_x, of_y = (float(np.linalg.norm(v)) for v in (y - x, x, y))
    return LayerDiff(
        layer=layer,
        l2=distance,
        relative=distance / max(of_x, of_y) if distance else 0.0,
        cosine=min(1.0, max(-1.0, float((x / of_x) @ (y / of_y)))) if of_x and of_y else None,
        max_abs=float(np.abs(y - x).max()),
        prev_l2=float(np.linalg.norm(prev)),
        tokens=int(b.tokens_written[0, layer] - a.tokens_written[0, layer]),
    )


def _mix(a: np.ndarray, b: np.ndarray, alpha: float) -> np.ndarray:
    """In fp64, rounded once: finite for finite a and b, and exactly a or b at the ends."""
    return ((1 - alpha) * a.astype(np.float64) + alpha * b.astype(np.float64)).astype(np.float32)


def _made(a: State, provenance: str) -> State:
    """A memory alone that goes with a, with a note of where it comes from; nothing of a's file."""
    return State(
        S=a.S,
        prev=a.prev,
        tokens_written=a.tokens_written,
        chunk=a.chunk,
        semantics=a.semantics,
        sidecar_sha256=a.sidecar_sha256,
        base_sha256=a.base_sha256,
        flags=MADE_BY_TOOL,
        provenance=provenance,
    )


def _name(state: State) -> str:
    """The file's hash in short; of what was never a file, that of the file it would be."""
    return (state.sha256 or hashlib.sha256(encode_state(state)).hexdigest())[:12]


def _check_number(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise LlamamemError(f"{name} is {value}, must be a number from 0 to 1")


def _check_one(state: State) -> None:
    if state.kind not in (SEQUENCE, MEMORY) or state.cells != 1:
        raise _refused(
            state, "state-kind", f"is of kind '{KINDS[state.kind]}': only the memory of one sequence can be worked on"
        )


def _check_pair(a: State, b: State) -> None:
    _check_one(a)
    _check_one(b)
    if a.memory_kind != b.memory_kind:
        text = f"is a memory of kind {b.memory_kind}, {_path(a)} of {a.memory_kind}: numbers of one mean nothing to"
        text += " the other"
        raise _refused(b, "state-identity", text)
    for name in ("sidecar", "base"):
        x, y = (getattr(state, f"{name}_sha256") for state in (a, b))
        if x != y:
            text = f"belongs to {name} {y}, and {_path(a)} to {x}: numbers of one mean nothing to the other"
            raise _refused(b, "state-identity", text)
    for name in ("layers", "heads", "states", "rank", "chunk", "semantics"):
        x, y = (getattr(state, name) for state in (a, b))
        if x != y:
            raise _refused(b, "state-shape", f"{name} is {y}, {_path(a)} has {x}")


def _path(state: State) -> Path | str:
    return state.path or "the other state"


def _refused(state: State, reason: str, text: str) -> LlamamemError:
    return LlamamemError(f"{state.path or 'state'}: [{reason}] {text}", reason=reason)
