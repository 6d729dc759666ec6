"""GGUF version 3 at the level of keys and tensors: a strict reader, and a writer that gives the same bytes again.

The reader checks every length against the size of the file before it uses it, so that a cut or hostile file ends in
one clear error. Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType

from llamamem.errors import LlamamemError

ALIGNMENT = 32
TYPE_SIZE = {"BF16": 2, "F16": 2, "F32": 4}  # bytes of a value

_SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}
_MAX_TENSORS = 1 << 16
_MAX_FIELDS = 1 << 16
_LONGEST_KEPT = 4096  # longer arrays and arrays of strings (vocabularies) are passed over


@dataclass(frozen=True)
class GgufField:
    """A key's type and value; the value of an array that was passed over is None."""

    type: GGUFValueType
    value: Any


@dataclass(frozen=True)
class GgufTensorInfo:
    """Where a tensor is; `shape` in torch order (ggml's ne reversed), `offset` in bytes from the start of the data."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int


@dataclass(frozen=True)
class GgufTensor:
    """A tensor's raw bytes; `dtype` is BF16, F16 or F32, `shape` in torch order."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes


@dataclass(frozen=True)
class GgufIndex:
    """All of a GGUF file but its tensor data; keys are in file order."""

    path: Path
    fields: dict[str, GgufField]
    tensors: list[GgufTensorInfo]
    data_start: int  # bytes

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key."""
        return self.fields[key].value if key in self.fields else default


class _Damaged(Exception):
    pass


def read_gguf_index(path: str | Path) -> GgufIndex:
    """Keys and tensor list of a GGUF file. Raises LlamamemError if it is missing, not GGUF, or damaged."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            return _read_index(path, _Cursor(file, path.stat().st_size))
    except FileNotFoundError:
        raise LlamamemError(f"{path}: no such file; check the path") from None
    except OSError as e:
        raise LlamamemError(f"{path}: cannot be read ({e.strerror}); give a readable .gguf file") from None
    except _Damaged as e:
        raise LlamamemError(f"{path}: {e}; fetch or export the file again") from None


def read_gguf_tensors(index: GgufIndex) -> Iterator[GgufTensor]:
    """The tensors of a file, one by one. Refuses types other than BF16, F16, F32, and data beyond the file's end."""
    path = index.path
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            for info in index.tensors:
                dtype = info.type.name
                if dtype not in TYPE_SIZE:
                    raise LlamamemError(f"{path}: tensor '{info.name}' has type {dtype}; BF16, F16 and F32 are legal")
                n_bytes = prod(info.shape) * TYPE_SIZE[dtype]
                start = index.data_start + info.offset
                if start + n_bytes > size:
                    raise LlamamemError(
                        f"{path}: tensor '{info.name}' ends at byte {start + n_bytes}, the file at {size}: it is cut "
                        "short; fetch or export it again"
                    )
                file.seek(start)
                yield GgufTensor(info.name, dtype, info.shape, file.read(n_bytes))
    except OSError as e:
        raise LlamamemError(f"{path}: cannot be read ({e.strerror}); give a readable .gguf file") from None


def write_gguf(path: str | Path, fields: Mapping[str, GgufField], tensors: Sequence[GgufTensor]) -> None:
    """Writes a file, beside its target and renamed: the same arguments give the same bytes.

    `fields` holds scalars and strings in the order of the file; `general.architecture` must be the first.
    """
    with replacing(Path(path)) as part:
        writer = gguf.GGUFWriter(part, fields["general.architecture"].value)
        for key, field in fields.items():
            if key != "general.architecture":  # the writer has put it first itself
                writer.add_key_value(key, field.value, field.type)
        for tensor in tensors:
            raw = np.frombuffer(tensor.data, np.uint8).reshape(*tensor.shape[:-1], -1)
            writer.add_tensor(tensor.name, raw, raw_dtype=GGMLQuantizationType[tensor.dtype])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; it replaces `path` when all went well and is removed when not."""
    if not path.parent.is_dir():
        raise LlamamemError(f"{path}: its directory does not exist; create it or give another --output")
    if path.is_dir():
        raise LlamamemError(f"{path}: is a directory; give a file name as --output")
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as e:
        raise LlamamemError(f"{path}: cannot be written ({e.strerror})") from None
    finally:
        part.unlink(missing_ok=True)


class _Cursor:
    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size, self.at = file, size, 0

    def skip(self, n: int) -> None:
        self.at += n
        if self.at > self.size:
            raise _Damaged("the GGUF header is cut short or damaged")
        self.file.seek(self.at)

    def take(self, n: int) -> bytes:
        if self.at + n > self.size:
            raise _Damaged("the GGUF header is cut short or damaged")
        self.at += n
        return self.file.read(n)

    def unpack(self, code: str) -> tuple[Any, ...]:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))

    def number(self, code: str) -> Any:
        return self.unpack(code)[0]

    def text(self) -> str:
        data = self.take(self.number("Q"))
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            raise _Damaged(f"{data[:40]!r} is not UTF-8 text") from None


def _read_index(path: Path, at: _Cursor) -> GgufIndex:
    magic = at.take(min(4, at.size))
    if magic != b"GGUF":
        raise _Damaged(f"not a GGUF file (it starts with {magic!r})")
    version = at.number("I")
    if version != 3:
        raise _Damaged(f"GGUF version {version} is not supported, 3 is")
    n_tensors, n_fields = at.unpack("QQ")
    if n_tensors > _MAX_TENSORS or n_fields > _MAX_FIELDS:
        raise _Damaged(f"{n_fields} keys and {n_tensors} tensors: the GGUF header is damaged")

    fields: dict[str, GgufField] = {}
    for _ in range(n_fields):
        key = at.text()
        if key in fields:
            raise _Damaged(f"key '{key}' is there twice")
        fields[key] = _read_field(at, key)
    alignment = fields["general.alignment"].value if "general.alignment" in fields else ALIGNMENT
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise _Damaged(f"key 'general.alignment' is {alignment!r}, must be a power of two")

    tensors: dict[str, GgufTensorInfo] = {}
    for _ in range(n_tensors):
        info = _read_tensor_info(at)
        if info.name in tensors:
            raise _Damaged(f"tensor '{info.name}' is there twice")
        if info.offset % alignment:
            raise _Damaged(f"tensor '{info.name}' starts at {info.offset}, not aligned to {alignment} bytes")
        tensors[info.name] = info
    return GgufIndex(path, fields, list(tensors.values()), -(-at.at // alignment) * alignment)


def _read_field(at: _Cursor, key: str) -> GgufField:
    kind = _value_type(at, key)
    if kind == GGUFValueType.STRING:
        return GgufField(kind, at.text())
    if kind != GGUFValueType.ARRAY:
        return GgufField(kind, at.number(_SCALARS[kind]))
    item, n = _value_type(at, key), at.number("Q")
    if item == GGUFValueType.ARRAY:
        raise _Damaged(f"key '{key}' is an array of arrays")
    if item == GGUFValueType.STRING:
        for _ in range(n):
            at.skip(at.number("Q"))
        return GgufField(kind, None)
    size = struct.calcsize(_SCALARS[item])
    if n > _LONGEST_KEPT:
        at.skip(n * size)
        return GgufField(kind, None)
    return GgufField(kind, list(at.unpack(f"{n}{_SCALARS[item]}")))


def _value_type(at: _Cursor, key: str) -> GGUFValueType:
    number = at.number("I")
    try:
        return GGUFValueType(number)
    except ValueError:
        raise _Damaged(f"key '{key}' has the unknown type {number}") from None


def _read_tensor_info(at: _Cursor) -> GgufTensorInfo:
    name = at.text()
    n_dims = at.number("I")
    if not 1 <= n_dims <= 4:
        raise _Damaged(f"tensor '{name}' has {n_dims} dimensions")
    shape = tuple(reversed(at.unpack(f"{n_dims}Q")))
    number, offset = at.unpack("IQ")
    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        raise _Damaged(f"tensor '{name}' has the unknown type {number}") from None
    if 0 in shape or prod(shape) > 1 << 48:
        raise _Damaged(f"tensor '{name}' has the impossible shape {list(shape)}")
    return GgufTensorInfo(name, shape, kind, offset)
