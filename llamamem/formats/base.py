"""What a sidecar has to know of its base GGUF: the widths of the attention projections, and its SHA-256.

A base that is split (`NAME-00001-of-00003.gguf`) is given by its first file. Its SHA-256 is over all its files,
one after the other in the order of their numbers.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamamem.errors import LlamamemError
from llamamem.formats.findings import quoted
from llamamem.formats.gguf_file import GgufIndex, read_gguf_index
from llamamem.formats.regular import open_regular

ARCHITECTURES = ("gemma4",)
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
    name: str
    hidden: int
    layers: tuple[AttentionLayer, ...]
    values_are_keys: frozenset[int] = frozenset()  # layers without a v projection: a delta of k or v would reach both


def read_base(path: str | Path) -> BaseModel:
    """Reads the headers of a base GGUF; refuses architectures that the runtime has no memory for, and missing parts."""
    index = read_gguf_index(path)
    for fault in base_faults(index):
        raise fault
    tensors = [info for part in base_indexes(index) for info in part.tensors]
    arch = str(index.get("general.architecture"))
    hidden = _number(index, f"{arch}.embedding_length")
    n_layers = _number(index, f"{arch}.block_count")
    pattern = index.get(f"{arch}.attention.sliding_window_pattern")
    if not isinstance(pattern, list) or len(pattern) != n_layers:
        raise LlamamemError(f"{path}: key '{arch}.attention.sliding_window_pattern' is not a list of {n_layers} values")
    shapes = {info.name: info.shape for info in tensors}
    layers = tuple(_layer(index, arch, shapes, i, bool(sliding), hidden) for i, sliding in enumerate(pattern))
    without = frozenset(
        layer.layer for layer in layers if layer.v_out is not None and f"blk.{layer.layer}.attn_v.weight" not in shapes
    )
    return BaseModel(Path(path), str(index.get("general.name", "")), hidden, layers, without)


def base_faults(index: GgufIndex) -> Iterator[LlamamemError]:
    """What makes a file no base for any memory."""
    arch = index.get("general.architecture")
    if arch not in ARCHITECTURES:
        yield LlamamemError(
            f"{index.path}: architecture is {quoted(str(arch))}; a memory is supported on {', '.join(ARCHITECTURES)}",
            reason="base-architecture",
        )
    try:
        base_files(index)
    except LlamamemError as fault:
        yield fault


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
