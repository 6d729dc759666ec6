"""Parity: the logits of every position, computed in process, against logits computed elsewhere."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from llamamem.errors import LlamamemError
from llamamem.native.runtime import Context, Model, State

# arrays of a states file: S [target layers, (N,) M, R, R], prev [target layers, N*R], pos [target layers]
STATE_ARRAYS = ("S", "prev", "pos")


@dataclass(frozen=True)
class StateParity:
    """Largest absolute differences of the states after the last token, over all target layers."""

    S_max_abs_diff: float
    prev_max_abs_diff: float
    tokens_written_equal: bool


@dataclass(frozen=True)
class Parity:
    """How far logits are apart. Differences are absolute, over all positions and the whole vocabulary."""

    n_tokens: int
    n_vocab: int
    max_abs_diff: float
    median_abs_diff: float
    top1_agreement: float  # share of positions with the same argmax, 0..1
    argmax_differences: int  # positions with another argmax
    worst_token: int  # position of max_abs_diff
    states: StateParity | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON; without `states` when none were compared."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def measure_parity(
    model: Model,
    ids: np.ndarray,
    logits: np.ndarray,
    *,
    n_ubatch: int = 512,
    kv: str = "f32",
    threads: int = 1,
    states: Mapping[str, np.ndarray] | None = None,
) -> Parity:
    """Feeds `ids [n]` from position 0 into a fresh context (flash attention off) and compares with `logits [n, V]`.

    `states` holds STATE_ARRAYS to compare with the memory after the last token. Raises LlamamemError for shapes that
    do not fit, ids outside the vocabulary and values that are not finite; exit status 1 when the model made those.
    """
    if logits.shape != (len(ids), model.n_vocab):
        raise LlamamemError(
            f"the reference logits have shape {list(logits.shape)}; {len(ids)} ids and the model's vocabulary"
            f" need {[len(ids), model.n_vocab]}"
        )
    if ids.min() < 0 or ids.max() >= model.n_vocab:
        raise LlamamemError(f"the ids range from {ids.min()} to {ids.max()}; the vocabulary has {model.n_vocab} tokens")
    _finite(logits, "the reference logits hold", exit_status=2)
    with Context(model, n_ctx=len(ids), n_ubatch=n_ubatch, kv=kv, threads=threads) as context:
        measured = context.decode(ids.astype(np.int32))
        _finite(measured, "the model computed", exit_status=1)
        state_parity = None if states is None else compare_states(context.states(), states)
    diff = np.abs(measured - logits.astype(np.float32))
    same = measured.argmax(axis=1) == logits.argmax(axis=1)
    return Parity(
        n_tokens=len(ids),
        n_vocab=model.n_vocab,
        max_abs_diff=float(diff.max()),
        median_abs_diff=float(np.median(diff)),
        top1_agreement=float(same.mean()),
        argmax_differences=int((~same).sum()),
        worst_token=int(np.argmax(diff.max(axis=1))),
        states=state_parity,
    )


def compare_states(measured: list[State], expected: Mapping[str, np.ndarray]) -> StateParity:
    """Compares the states of all target layers with STATE_ARRAYS. Raises LlamamemError when the shapes do not fit."""
    S = np.stack([state.S for state in measured])
    prev = np.stack([state.prev for state in measured])
    if expected["S"].size != S.size or expected["prev"].size != prev.size:
        raise LlamamemError(
            f"the reference states have S {list(expected['S'].shape)} and prev {list(expected['prev'].shape)};"
            f" the model's are {list(S.shape)} and {list(prev.shape)}"
        )
    return StateParity(
        S_max_abs_diff=float(np.abs(S - expected["S"].reshape(S.shape)).max()),
        prev_max_abs_diff=float(np.abs(prev - expected["prev"].reshape(prev.shape)).max()),
        tokens_written_equal=[state.n for state in measured] == expected["pos"].ravel().tolist(),
    )


def load_ids(path: str | os.PathLike[str]) -> np.ndarray:
    """Token ids from a .npy file or FILE.npz:NAME: one dimension, integers, at least one."""
    ids = _load_npy(path)
    if ids.ndim != 1 or ids.size == 0 or not np.issubdtype(ids.dtype, np.integer):
        raise LlamamemError(f"{path}: token ids are a one-dimensional integer array, this is {ids.dtype} {ids.shape}")
    return ids


def load_logits(path: str | os.PathLike[str]) -> np.ndarray:
    """Logits from a .npy file or FILE.npz:NAME: two dimensions (tokens, vocabulary), floating point."""
    logits = _load_npy(path)
    if logits.ndim != 2 or not np.issubdtype(logits.dtype, np.floating):
        raise LlamamemError(
            f"{path}: logits are a floating-point array [tokens, vocabulary], this is {logits.dtype} {logits.shape}"
        )
    return logits


def load_states(path: str | os.PathLike[str], prefix: str = "") -> dict[str, np.ndarray]:
    """STATE_ARRAYS from a .npz file, where each name may have a prefix."""
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [prefix + name for name in STATE_ARRAYS if prefix + name not in file]
            if missing:
                raise LlamamemError(f"{path}: no array {missing[0]!r}: give --states-prefix, or another file")
            return {name: file[prefix + name] for name in STATE_ARRAYS}
    except (OSError, ValueError, EOFError, TypeError, AttributeError) as e:
        raise LlamamemError(f"{path}: not a .npz file of states ({e})") from e


def _load_npy(path: str | os.PathLike[str]) -> np.ndarray:
    """An array of a .npy file, or of an archive: `FILE.npz:NAME`."""
    file, archive, name = str(path).partition(".npz:")
    try:
        array = np.load(file + archive.removesuffix(":"), allow_pickle=False)
    except (OSError, ValueError, EOFError) as e:
        raise LlamamemError(f"{path}: not a readable .npy file ({e})") from e
    if isinstance(array, np.ndarray):
        return array
    with array:
        if name not in array:
            raise LlamamemError(f"{path}: an archive: give FILE.npz:NAME with one of {', '.join(sorted(array))}")
        return array[name]


def _finite(logits: np.ndarray, subject: str, exit_status: int) -> None:
    bad = np.argwhere(~np.isfinite(logits))
    if len(bad):
        row, column = bad[0]
        raise LlamamemError(
            f"{subject} NaN or infinity ({len(bad)} values, the first at token {row}, vocabulary entry {column}):"
            " nothing can be compared",
            exit_status=exit_status,
        )
