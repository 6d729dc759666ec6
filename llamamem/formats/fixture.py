"""Layer fixtures: one memory layer's weights (or features), inputs, intermediates and final state in an .npz file.

The form of the first implementation, JSON, is read too: fixture_json.py.

Arrays are named as in the specification of the memory; weights are `w.` + the sidecar's short name; `meta` is JSON.
T tokens, H hidden size, R rank, N state heads, D = N*R, M states. A leading batch axis is allowed everywhere
(B sequences, each with its own state), and so are separate head axes: everything is brought to the shapes below.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llamamem.errors import LlamamemError
from llamamem.formats.fixture_json import read_json_fixture

FEATURES = ("r", "decay", "k", "v", "a", "b", "keep", "erase", "write")

# what may be compared: per token, and after the last one
TRACE = ("s", "beta", "lam", "r", "w", "decay", "k", "v", "a", "b", "g", "raw_read", "routes", "out")
DELTAS = ("delta_q", "delta_k", "delta_v", "delta_o")
FINAL = ("final_S", "final_prev", "final_pos")

VECTORS = ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "w0", "a0", "k_k", "k_a", "ln_x.weight")
MATRICES = ("receptance.weight", "key.weight", "value.weight", "output.weight")

# a size or rule of the layer: its names in `meta`, and the published value
_RULES: dict[str, tuple[tuple[str, ...], Any]] = {
    "chunk": (("chunk", "chunk_size", "rwkv_ms_chunk_size"), 1024),
    "semantics": (("semantics_version", "rwkv_ms_semantics_version", "semantics"), 1),
    "alpha": (("alpha",), 16.0),
    "erase_gate": (("erase_gate", "rwkv_ms_erase_gate"), 1.0),
    "update_mode": (("state_update_mode", "update_mode"), "standard"),
}
_SIZES = {
    "rank": ("rank",),
    "states": ("num_states", "rwkv_ms_num_states", "states"),
    "heads": ("num_state_heads", "num_heads", "heads"),
}


@dataclass(frozen=True)
class FixtureSequence:
    """One sequence of a fixture, ready to run."""

    h: np.ndarray | None  # [T, H]
    features: np.ndarray | None  # [T, 9*D], columns in the order of FEATURES
    S: np.ndarray  # [N, M, R, R]
    prev: np.ndarray  # [D]
    n_past: int
    live: np.ndarray  # [T] bool, False for padding
    expected: dict[str, np.ndarray]  # per token [T, ...]; final_* without a token axis; delta_* [rows, width]


@dataclass(frozen=True)
class LayerFixture:
    """A fixture file: `rules` are the keyword arguments of a memory shape."""

    path: Path
    rules: dict[str, Any]
    weights: dict[str, np.ndarray] | None  # by short name, torch shapes; None: the sequences carry features
    delta_rows: np.ndarray  # the tokens whose deltas are in the file
    sequences: tuple[FixtureSequence, ...]


def read_fixture(path: str | Path) -> LayerFixture:
    """Reads and checks a fixture; every fault is a LlamamemError that names the file and the array."""
    path = Path(path)
    arrays = _load(path)
    meta = _meta(path, arrays)
    weights = {name[2:]: np.asarray(a, np.float32) for name, a in arrays.items() if name.startswith("w.")} or None
    inputs = ("h", "S0", "prev0", "pos0") if weights else (*FEATURES, "S0", "pos0")
    for name in (*inputs, "raw_read", "final_S"):
        if name not in arrays:
            kind = "with weights" if weights else "without weights (no w.* arrays)"
            raise LlamamemError(f"{path}: array '{name}' is missing; a fixture {kind} needs {' '.join(inputs)}")

    rules = _rules(path, arrays, meta, weights)
    heads, rank, states = rules["heads"], rules["rank"], rules["states"]
    width = heads * rank
    if weights:
        _check_weights(path, weights, rules)

    S0 = arrays["S0"]
    n_seq = S0.size // (heads * states * rank * rank)
    n_tok = _token_count(path, arrays, "h" if weights else "r", n_seq, rules["hidden"] if weights else width)
    shaped = _Shaper(path, n_seq, n_tok)
    rows = arrays.get("delta_tokens", np.arange(n_tok)).astype(np.int64).reshape(-1)
    if rows.size and (np.min(rows) < 0 or np.max(rows) >= n_tok):
        raise LlamamemError(f"{path}: array 'delta_tokens' names a token outside 0..{n_tok - 1}")

    state = shaped.final("S0", S0, (heads, states, rank, rank))
    prev = shaped.final("prev0", arrays.get("prev0", np.zeros(width)), (width,))
    pos = shaped.final("pos0", arrays["pos0"], (), np.int64)
    if pos.min() < 0:
        raise LlamamemError(f"{path}: array 'pos0' is negative; it counts the tokens written so far")
    live = shaped.tokens("token_mask", arrays.get("token_mask", np.ones(n_tok)), (1,))[..., 0] != 0
    h = shaped.tokens("h", arrays["h"], (rules["hidden"],)) if weights else None
    features = None if weights else np.concatenate([shaped.gate(n, arrays[n], heads, rank) for n in FEATURES], -1)
    expected = _expected(shaped, arrays, rules, weights, len(rows))
    sequences = tuple(
        FixtureSequence(
            h=None if h is None else h[i],
            features=None if features is None else features[i],
            S=state[i],
            prev=prev[i],
            n_past=int(pos[i]),
            live=live[i],
            expected={name: a[i] for name, a in expected.items()},
        )
        for i in range(n_seq)
    )
    return LayerFixture(path=path, rules=rules, weights=weights, delta_rows=rows, sequences=sequences)


def _load(path: Path) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as raw:
            if (start := raw.read(64)).lstrip()[:1] == b"{":
                return read_json_fixture(path, start + raw.read())
        with np.load(path, allow_pickle=False) as file:
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise LlamamemError(f"{path}: a single array, not an .npz fixture")
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise LlamamemError(f"{path}: no such fixture") from None
    except (OSError, ValueError, EOFError, KeyError, TypeError, RuntimeError, zipfile.BadZipFile, zlib.error) as e:
        # NumPy's words for whatever it does not know are advice to unpickle it
        why = f" ({e})" if isinstance(e, OSError) or "pickle" not in str(e) else ""
        raise LlamamemError(f"{path}: not a readable .npz or JSON fixture{why}") from None


def _meta(path: Path, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The JSON of `meta`, over scalars that are arrays of their own."""
    meta = {name: a.item() for name, a in arrays.items() if a.size == 1 and a.ndim <= 1 and name != "meta"}
    if "meta" in arrays:
        try:
            text = arrays["meta"].reshape(-1)[0].item()
            given = json.loads(text)
        except (ValueError, IndexError, AttributeError, TypeError):
            raise LlamamemError(f"{path}: array 'meta' is not JSON text") from None
        if not isinstance(given, dict):
            raise LlamamemError(f"{path}: array 'meta' is not a JSON object")
        meta |= {name: value for name, value in given.items() if value is not None}
    return meta


def _pick(meta: Mapping[str, Any], names: tuple[str, ...], default: Any) -> Any:
    return next((meta[name] for name in names if name in meta), default)


def _rules(
    path: Path, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any], weights: Mapping[str, np.ndarray] | None
) -> dict[str, Any]:
    S0, rules = arrays["S0"], {name: _pick(meta, names, default) for name, (names, default) in _RULES.items()}
    if S0.ndim < 3 or 0 in S0.shape or S0.shape[-1] != S0.shape[-2]:
        raise LlamamemError(f"{path}: array 'S0' has shape {S0.shape}, expected [..., M, R, R]")
    rank, states, lead = S0.shape[-1], S0.shape[-3], int(np.prod(S0.shape[:-3]))
    if weights:
        if "mem_v" not in weights or weights["mem_v"].ndim != 2:
            raise LlamamemError(f"{path}: array 'w.mem_v' [D, H] is missing or has another shape")
        width, hidden = weights["mem_v"].shape
        heads = width // rank
    else:
        hidden, heads = 0, _pick(meta, _SIZES["heads"], _heads_of_features(arrays, rank, lead))
    found = {"rank": rank, "states": states, "heads": heads}
    for name, value in found.items():
        said = _pick(meta, _SIZES[name], value)
        if said != value:
            raise LlamamemError(f"{path}: meta says {said} {name}, the arrays have {value}")
    if not isinstance(heads, int) or heads < 1 or lead % heads:
        raise LlamamemError(f"{path}: {heads} state heads do not fit array 'S0' of shape {S0.shape}")
    try:
        for name, kind in {"chunk": int, "semantics": int, "alpha": float, "erase_gate": float}.items():
            rules[name] = kind(rules[name])
    except (ValueError, TypeError):
        raise LlamamemError(f"{path}: meta: {name} is not a number: {rules[name]!r}") from None
    if rules["semantics"] not in (1, 2):
        raise LlamamemError(f"{path}: meta: semantics version {rules['semantics']} is unknown; 1 and 2 are known")
    if rules["chunk"] < 1:
        raise LlamamemError(f"{path}: meta: chunk is {rules['chunk']}; at least 1 token is needed")
    if rules["update_mode"] not in ("standard", "lambda_outside", "no_lambda"):
        raise LlamamemError(f"{path}: meta: state_update_mode {rules['update_mode']!r} is unknown")
    coupled = bool(_pick(meta, ("couple_lambda",), not weights or "lambda" not in weights))
    return rules | found | {"hidden": hidden, "couple_lambda": coupled}


def _heads_of_features(arrays: Mapping[str, np.ndarray], rank: int, lead: int) -> int:
    """Without a word in meta: an explicit head axis or a wide row decides, and otherwise the axis is a batch."""
    r = arrays["r"]
    if r.shape[-1] > rank:
        return r.shape[-1] // rank
    if arrays["S0"].ndim >= 5:
        return arrays["S0"].shape[-4]
    return lead if r.ndim >= 3 and r.shape[-2] == lead and arrays["pos0"].size == 1 else 1


def _token_count(path: Path, arrays: Mapping[str, np.ndarray], name: str, n_seq: int, width: int) -> int:
    size = arrays[name].size
    if size == 0 or size % (n_seq * width):
        raise LlamamemError(
            f"{path}: array '{name}' of shape {arrays[name].shape} does not hold tokens of width {width} "
            f"for {n_seq} sequence{'s' if n_seq > 1 else ''}"
        )
    return size // (n_seq * width)


def _check_weights(path: Path, weights: Mapping[str, np.ndarray], rules: Mapping[str, Any]) -> None:
    width, hidden, heads = rules["heads"] * rules["rank"], rules["hidden"], rules["heads"]
    gates = ("beta",) if rules["couple_lambda"] else ("beta", "lambda")
    want: dict[str, list[tuple[Any, ...]]] = {"mem_v": [(width, hidden)]}
    want |= {gate: [(width, hidden), (heads, hidden)] for gate in gates}
    want |= {f"{gate}_b": [(width,), (heads,)] for gate in gates}
    want |= {f"rwkv.{name}": [(width,)] for name in VECTORS}
    want |= {f"rwkv.{name}": [(width, width)] for name in MATRICES}
    for n in "wag":
        # each LoRA may have a width of its own
        first = weights.get(f"rwkv.{n}1")
        lora: int | str = first.shape[-1] if first is not None and first.ndim == 2 else "L"
        want |= {f"rwkv.{n}1": [(width, lora)], f"rwkv.{n}2": [(lora, width)]}
    want |= {name: [(weights[name].shape[0], width)] for name in DELTAS if name in weights and weights[name].ndim}
    for name, shapes in want.items():
        if name not in weights:
            raise LlamamemError(f"{path}: array 'w.{name}' {list(shapes[0])} is missing")
        if weights[name].shape not in shapes:
            raise LlamamemError(f"{path}: array 'w.{name}' has shape {weights[name].shape}, expected {shapes[0]}")


def _expected(
    shaped: _Shaper,
    arrays: Mapping[str, np.ndarray],
    rules: Mapping[str, Any],
    weights: Mapping[str, np.ndarray] | None,
    n_rows: int,
) -> dict[str, np.ndarray]:
    heads, rank, states = rules["heads"], rules["rank"], rules["states"]
    names = TRACE if weights else ("raw_read", "routes")
    expected = {}
    for name in names:
        if name in arrays:
            wide = name in ("beta", "lam")
            size = heads * states if name == "routes" else heads * rank
            expected[name] = (
                shaped.gate(name, arrays[name], heads, rank) if wide else shaped.tokens(name, arrays[name], (size,))
            )
    for name in DELTAS:
        if weights and name in arrays and name in weights:
            width = weights[name].shape[0]
            expected[name] = _Shaper(shaped.path, shaped.n_seq, n_rows).tokens(name, arrays[name], (width,))
    shapes: dict[str, tuple[int, ...]] = {
        "final_S": (heads, states, rank, rank),
        "final_prev": (heads * rank,),
        "final_pos": (),
    }
    for name, shape in shapes.items():
        if name in arrays and (weights or name != "final_prev"):
            expected[name] = shaped.final(name, arrays[name], shape, np.int64 if name == "final_pos" else np.float32)
    return expected


@dataclass(frozen=True)
class _Shaper:
    """Brings arrays to [B, T, width] or [B, ...]; the only place that knows which layouts are accepted."""

    path: Path
    n_seq: int
    n_tok: int

    def tokens(self, name: str, array: np.ndarray, widths: tuple[int, ...]) -> np.ndarray:
        """[B, T, one of widths] of any of [T, width], [B, T, width], [B, T, N, R], [B, N, T, R]."""
        total = self.n_seq * self.n_tok
        if not any(int(np.prod(array.shape[:i])) == total for i in range(array.ndim + 1)) and array.ndim >= 3:
            array = array.swapaxes(-3, -2)
        if name == "token_mask" and array.size == self.n_tok:
            array = np.broadcast_to(array.reshape(1, -1), (self.n_seq, self.n_tok))
        if not any(array.size == total * width for width in widths):
            expected = f"[{self.n_tok}, {widths[0]}]"
            raise LlamamemError(f"{self.path}: array '{name}' has shape {array.shape}, expected {expected}")
        return np.asarray(array, np.float32).reshape(self.n_seq, self.n_tok, -1)

    def gate(self, name: str, array: np.ndarray, heads: int, rank: int) -> np.ndarray:
        """[B, T, D]; one value a head, or one a token, is repeated."""
        x = self.tokens(name, array, (heads * rank, heads, 1))
        return np.repeat(x, heads * rank // x.shape[-1], axis=-1)

    def final(self, name: str, array: np.ndarray, shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
        """[B, *shape]; one value for all sequences is repeated."""
        size = int(np.prod(shape))
        if array.size not in (size, size * self.n_seq):
            raise LlamamemError(f"{self.path}: array '{name}' has shape {array.shape}, expected {list(shape)}")
        return np.broadcast_to(np.asarray(array, dtype).reshape(-1, *shape), (self.n_seq, *shape))
