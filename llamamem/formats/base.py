"""What a sidecar has to know of its base GGUF: the widths of the attention projections, and its SHA-256."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamamem.errors import LlamamemError
from llamamem.formats.findings import quoted
from llamamem.formats.gguf_file import GgufIndex, read_gguf_index
from llamamem.formats.regular import open_regular

ARCHITECTURES = ("gemma4",)
SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class AttentionLayer:
    """Output widths of one layer's projections; None where the layer uses the keys and values of an earlier one."""

    layer: int
    attention_kind: str  # SLIDING or FULL
    q_out: int
    k_out: int | None
    v_out: int | None
    o_out: int

    def width(self, head: str) -> int | None:
        """The width of the delta head q, k, v or o."""
        return {"q": self.q_out, "k": self.k_out, "v": self.v_out, "o": self.o_out}[head]


@dataclass(frozen=True)
class BaseModel:
    """A base GGUF as far as a sidecar is concerned."""

    path: Path
    name: str
    hidden: int
    layers: tuple[AttentionLayer, ...]
    values_are_keys: frozenset[int] = frozenset()  # layers without a v projection: a delta of k or v would reach both


def read_base(path: str | Path) -> BaseModel:
    """Reads the header of a base GGUF; refuses split files and architectures that the runtime has no memory for."""
    index = read_gguf_index(path)
    for fault in base_faults(index):
        raise fault
    arch = str(index.get("general.architecture"))
    hidden = _number(index, f"{arch}.embedding_length")
    n_layers = _number(index, f"{arch}.block_count")
    pattern = index.get(f"{arch}.attention.sliding_window_pattern")
    if not isinstance(pattern, list) or len(pattern) != n_layers:
        raise LlamamemError(f"{path}: key '{arch}.attention.sliding_window_pattern' is not a list of {n_layers} values")
    shapes = {info.name: info.shape for info in index.tensors}
    layers = tuple(_layer(index, arch, shapes, i, bool(sliding), hidden) for i, sliding in enumerate(pattern))
    without = frozenset(
        layer.layer for layer in layers if layer.v_out is not None and f"blk.{layer.layer}.attn_v.weight" not in shapes
    )
    return BaseModel(Path(path), str(index.get("general.name", "")), hidden, layers, without)


def base_faults(index: GgufIndex) -> Iterator[LlamamemError]:
    """What makes a file no base for any memory."""
    arch, split = index.get("general.architecture"), index.get("split.count", 1)
    if arch not in ARCHITECTURES:
        yield LlamamemError(
            f"{index.path}: architecture is {quoted(str(arch))}; a memory is supported on {', '.join(ARCHITECTURES)}",
            reason="base-architecture",
        )
    if split not in (0, 1):
        yield LlamamemError(
            f"{index.path}: is split into several files, which is not supported; merge them with "
            "llama-gguf-split --merge",
            reason="base-split",
        )


def file_sha256(path: str | Path, progress: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file in hex, read in pieces; `progress` is told the bytes of each."""
    digest = hashlib.sha256()
    try:
        with open_regular(path) as file:
            while piece := file.read(4 << 20):
                digest.update(piece)
                if progress is not None:
                    progress(len(piece))
    except OSError as e:
        raise LlamamemError(f"{path}: cannot be read ({e.strerror})") from None
    return digest.hexdigest()


def _layer(
    index: GgufIndex, arch: str, shapes: dict[str, tuple[int, ...]], i: int, sliding: bool, hidden: int
) -> AttentionLayer:
    """The widths are those of the tensors, and must be what the keys say."""
    swa = "_swa" if sliding else ""
    heads = _number(index, f"{arch}.attention.head_count", i)
    heads_kv = _number(index, f"{arch}.attention.head_count_kv", i)
    key = _number(index, f"{arch}.attention.key_length{swa}")
    value = _number(index, f"{arch}.attention.value_length{swa}")
    n_shared = _number(index, f"{arch}.attention.shared_kv_layers", low=0, default=0)
    shared = i >= _number(index, f"{arch}.block_count") - n_shared
    said: dict[str, tuple[int, ...]] = {
        "attn_q": (heads * key, hidden),
        "attn_k": (heads_kv * key, hidden),
        "attn_v": (heads_kv * value, hidden),
        "attn_output": (hidden, heads * value),
    }
    for tensor, shape in said.items():
        found = shapes.get(f"blk.{i}.{tensor}.weight")
        # large models of the family have no v projection (v is k), and layers that share have neither
        optional = tensor == "attn_v" or (shared and tensor == "attn_k")
        if found != shape and not (found is None and optional):
            raise LlamamemError(
                f"{index.path}: tensor 'blk.{i}.{tensor}.weight' has shape {found and list(found)}, its keys say "
                f"{list(shape)}"
            )
    return AttentionLayer(
        layer=i,
        attention_kind=SLIDING if sliding else FULL,
        q_out=heads * key,
        k_out=None if shared else heads_kv * key,
        v_out=None if shared else heads_kv * value,
        o_out=hidden,
    )


def _number(index: GgufIndex, key: str, i: int = 0, low: int = 1, default: int | None = None) -> int:
    value: Any = index.get(key, default)
    if isinstance(value, list) and i < len(value):
        value = value[i]
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise LlamamemError(f"{index.path}: key '{key}' is {quoted(str(value))}, expected an integer from {low}")
    return value
