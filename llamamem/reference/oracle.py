"""NumPy fp32 oracle of one RWKV-MS memory layer (multi-state RWKV-7 memory, arXiv 2503.14456).

Shapes: T tokens, H hidden size, R rank, N state heads, D = N*R, M states a head, C tokens a chunk, L LoRA width.
Everything is fp32. The functions are pure: state goes in, state comes out. The features of all tokens are computed
at once and the scan token by token, so that any split of a token sequence gives the same result up to the order in
which sums are taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

# what the scan consumes, [T, D] each: the order of the columns of a features array [T, 9*D]
FEATURES = ("r", "decay", "k", "v", "a", "b", "keep", "erase", "write")
HEADS = ("q", "k", "v", "o")
UPDATE_MODES = ("standard", "lambda_outside", "no_lambda")

# values of the token mask: a frozen token reads and writes nothing, a padding token reads zero and writes nothing
LIVE, FROZEN, PADDING = 0, 1, 2

# Named arrays of one layer. Per token [T, D]: s beta lam r w decay k v a b g raw_read out; routes [T, N, M];
# delta_{q,k,v,o} [T, width] for the heads in use; after the last token final_S [N, M, R, R], final_prev [D] and
# final_pos [] (int64, tokens written). When features were given: raw_read, routes, final_S and final_pos only.
LayerTrace = dict[str, np.ndarray]


@dataclass(frozen=True)
class MemoryShape:
    """Sizes and rules of one memory layer; the defaults are those of the published checkpoint."""

    hidden: int = 2560  # H
    rank: int = 8  # R
    heads: int = 1  # N
    states: int = 4  # M
    chunk: int = 1024  # C, tokens
    semantics: int = 1  # 1 or 2
    alpha: float = 16.0  # deltas are scaled by alpha / R
    erase_gate: float = 1.0
    update_mode: str = "standard"  # one of UPDATE_MODES
    couple_lambda: bool = True

    @property
    def width(self) -> int:
        """D: the width of the memory source."""
        return self.heads * self.rank


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
) -> LayerTrace:
    """Runs T tokens through one layer and returns every intermediate and the final state.

    Either `weights` (by sidecar short name, torch shapes) with `h [T, H]`, or `features [T, 9*D]` (see FEATURES).
    `S [N, M, R, R]`, `prev [D]` and `n_past` (tokens written so far) are the state before the first token.
    `mask [T]` holds LIVE, FROZEN or PADDING; without it every token is live.
    """
    raise LookupError("being written")
