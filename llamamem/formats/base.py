"""What a sidecar has to know of its base GGUF: the widths of the attention projections, and its SHA-256.

A base that is split (`NAME-00001-of-00003.gguf`) is given by its first file. Its SHA-256 is over all its files,
one after the other in the order of their numbers.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamamem.errors import LlamamemError
from llamamem.formats.findings import quoted
from llamamem.formats.gguf_file import GgufIndex, read_gguf_index
from llamamem.formats.regular import open_regular

TESTED = ("gemma4", "gemma3", "qwen3", "smollm3", "llama")  # architectures with a parity fixture

# How a converter left the rows of q and k: as they were, or permuted within each head for a rope over neighbours
# [TAG_ADAPTER_MEM_ROWS]. Of an architecture that is in neither, `sidecar export --row-order` has to say it.
ROWS = dict.fromkeys(
    ("gemma4", "gemma3", "gemma3n", "gemma2", "qwen3", "qwen2", "phi3", "olmo2"), "hf"
) | dict.fromkeys(("llama", "smollm3", "granite", "arcee"), "norm")

_SPLIT_NAME = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
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
    arch: str  # llama.cpp's name of the architecture
    name: str
    hidden: int
    head_dim: int  # width of a head of q and k, in layers of full attention
    layers: tuple[AttentionLayer, ...]
    values_are_keys: frozenset[int] = frozenset()  # layers without a v projection: a delta of k or v would reach both


def read_base(path: str | Path) -> BaseModel:
    """Reads the headers of a base GGUF, all its files. Raises LlamamemError for what is no language model's."""
    index = read_gguf_index(path)
    tensors = [info for part in base_indexes(index) for info in part.tensors]
    arch = str(index.get("general.architecture"))
    if index.get(f"{arch}.embedding_length") is None:
        text = f"architecture is {quoted(arch)}, and no key says how wide its layers are; give a language model"
        raise LlamamemError(f"{index.path}: {text}")
    hidden = _number(index, f"{arch}.embedding_length")
    sliding = _sliding(index, arch, _number(index, f"{arch}.block_count"))
    shapes = {info.name: info.shape for info in tensors}
    make = _gemma4_layer if arch == "gemma4" else _layer
    layers = tuple(make(index, arch, shapes, i, is_sliding, hidden) for i, is_sliding in enumerate(sliding))
    without = frozenset(
        layer.layer
        for layer in layers
        if layer.v_out is not None and not {f"blk.{layer.layer}.attn_{x}.weight" for x in ("v", "qkv")} & shapes.keys()
    )
    name, head_dim = str(index.get("general.name", "")), _head_dim(index, arch, hidden)
    return BaseModel(Path(path), arch, name, hidden, head_dim, layers, without)


def base_files(index: GgufIndex) -> list[Path]:
    """The files of a base, of which `index` is the first: one, or all that stand beside it as parts of a split.

    Raises LlamamemError (`base-split`) for another file than the first, and for one that is not there.
    """
    number, count = _split(index, "no", 0), _split(index, "count", 1)
    if count < 2:
        return [index.path]
    named = _SPLIT_NAME.fullmatch(index.path.name)
    if named is None or (int(named["number"]), int(named["count"])) != (number + 1, count):
        raise _split_fault(
            index, f"is number {number + 1} of {count} files: name it NAME-{number + 1:05}-of-{count:05}.gguf"
        )
    names = [f"{named['name']}-{i:05}-of-{count:05}.gguf" for i in range(1, count + 1)]
    if number != 0:
        raise _split_fault(index, f"is number {number + 1} of {count} files; give the first, {names[0]}")
    paths = [index.path.with_name(name) for name in names]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise _split_fault(
            index, f"is one of {count} files, {', '.join(missing)} not among them; put it beside the others"
        )
    return paths


def base_indexes(index: GgufIndex) -> Iterator[GgufIndex]:
    """The headers of all files of a base, the given one first."""
    yield index
    for number, path in enumerate(base_files(index)[1:], 1):
        part = read_gguf_index(path)
        if (_split(part, "no", 0), _split(part, "count", 1)) != (number, _split(index, "count", 1)):
            raise _split_fault(part, f"is no part of {index.path.name}; fetch it again")
        yield part


def file_sha256(*paths: str | Path, progress: Callable[[int], None] | None = None) -> str:
    """SHA-256 in hex of a file, or of several one after the other; `progress` is told the bytes of each piece."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            with open_regular(path) as file:
                while piece := file.read(4 << 20):
                    digest.update(piece)
                    if progress is not None:
                        progress(len(piece))
        except OSError as e:
            raise LlamamemError(f"{path}: cannot be read ({e.strerror})") from None
    return digest.hexdigest()


def base_sha256(path: str | Path, progress: Callable[[int], None] | None = None) -> str:
    """SHA-256 in hex of a base, of all its files."""
    return file_sha256(*base_files(read_gguf_index(path)), progress=progress)


def _split(index: GgufIndex, name: str, default: int) -> int:
    value = index.get(f"split.{name}", default)
    return value if isinstance(value, int) and not isinstance(value, bool) else default


def _split_fault(index: GgufIndex, text: str) -> LlamamemError:
    return LlamamemError(f"{index.path}: {text}", reason="base-split")


def _sliding(index: GgufIndex, arch: str, n_layers: int) -> list[bool]:
    """Which layers see a window alone: a list in the file, or every n-th layer does not."""
    key = f"{arch}.attention.sliding_window_pattern"
    default = 6 if arch == "gemma3" and index.get(f"{arch}.attention.sliding_window") else [False] * n_layers
    pattern = index.get(key, None if arch == "gemma4" else default)
    if isinstance(pattern, int) and not isinstance(pattern, bool) and pattern > 0:
        return [i % pattern < pattern - 1 for i in range(n_layers)]
    if not isinstance(pattern, list) or len(pattern) != n_layers:
        raise LlamamemError(f"{index.path}: key '{key}' is not a list of {n_layers} values")
    return [bool(sliding) for sliding in pattern]


def _head_dim(index: GgufIndex, arch: str, hidden: int) -> int:
    heads = max(1, _number(index, f"{arch}.attention.head_count", low=0, default=1))
    return _number(index, f"{arch}.attention.key_length", default=max(1, hidden // heads))


def _layer(
    index: GgufIndex, arch: str, shapes: dict[str, tuple[int, ...]], i: int, sliding: bool, hidden: int
) -> AttentionLayer:
    """The widths that the keys say, held against the tensors; 0 in a layer that has no such attention."""
    heads = _number(index, f"{arch}.attention.head_count", i, low=0)
    heads_kv = _number(index, f"{arch}.attention.head_count_kv", i, low=0, default=heads)
    key = _head_dim(index, arch, hidden)
    value = _number(index, f"{arch}.attention.value_length", default=key)
    q, k, v = heads * key, heads_kv * key, heads_kv * value
    weights = {"attn_q": (q, hidden), "attn_k": (k, hidden), "attn_v": (v, hidden)}
    if f"blk.{i}.attn_qkv.weight" in shapes:
        weights = {"attn_qkv": (q + k + v, hidden)}
    elif f"blk.{i}.attn_q.weight" not in shapes:
        return AttentionLayer(i, SLIDING if sliding else FULL, 0, None, None, 0)
    _check_shapes(index, shapes, i, weights | {"attn_output": (hidden, heads * value)}, optional=())
    return AttentionLayer(i, SLIDING if sliding else FULL, q, k, v, hidden)


def _gemma4_layer(
    index: GgufIndex, arch: str, shapes: dict[str, tuple[int, ...]], i: int, sliding: bool, hidden: int
) -> AttentionLayer:
    """As above, where heads have other widths in sliding layers, and the last layers share keys and values."""
    swa = "_swa" if sliding else ""
    heads = _number(index, f"{arch}.attention.head_count", i)
    heads_kv = _number(index, f"{arch}.attention.head_count_kv", i)
    key = _number(index, f"{arch}.attention.key_length{swa}")
    value = _number(index, f"{arch}.attention.value_length{swa}")
    n_shared = _number(index, f"{arch}.attention.shared_kv_layers", low=0, default=0)
    shared = i >= _number(index, f"{arch}.block_count") - n_shared
    weights = {
        "attn_q": (heads * key, hidden),
        "attn_k": (heads_kv * key, hidden),
        "attn_v": (heads_kv * value, hidden),
        "attn_output": (hidden, heads * value),
    }
    # large models of the family have no v projection (v is k), and layers that share have neither
    _check_shapes(index, shapes, i, weights, optional=("attn_v", "attn_k") if shared else ("attn_v",))
    return AttentionLayer(
        layer=i,
        attention_kind=SLIDING if sliding else FULL,
        q_out=heads * key,
        k_out=None if shared else heads_kv * key,
        v_out=None if shared else heads_kv * value,
        o_out=hidden,
    )


def _check_shapes(
    index: GgufIndex,
    shapes: Mapping[str, tuple[int, ...]],
    i: int,
    wanted: Mapping[str, tuple[int, ...]],
    optional: tuple[str, ...],
) -> None:
    for tensor, shape in wanted.items():
        found = shapes.get(f"blk.{i}.{tensor}.weight")
        if found != shape and not (found is None and tensor in optional):
            raise LlamamemError(
                f"{index.path}: tensor 'blk.{i}.{tensor}.weight' has shape {found and list(found)}, its keys say "
                f"{list(shape)}"
            )


def _number(index: GgufIndex, key: str, i: int = 0, low: int = 1, default: int | None = None) -> int:
    value: Any = index.get(key, default)
    if isinstance(value, list) and i < len(value):
        value = value[i]
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise LlamamemError(f"{index.path}: key '{key}' is {quoted(str(value))}, expected an integer from {low}")
    return value
