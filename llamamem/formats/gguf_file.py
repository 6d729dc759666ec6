"""GGUF version 3 at the level of keys and tensors: a reader of headers, a strict one of whole files, and a writer.

Both readers check every length against the size of the file before they use it, so that a cut or hostile file ends in
one clear error. Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; what the strict one holds a file to,
and in which order, is stage 1 of docs/sidecar.md. The writer gives the same bytes again.
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType

from llamamem.errors import LlamamemError
from llamamem.formats.findings import quoted
from llamamem.formats.regular import open_regular

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
_MAX_FILE = 1 << 30  # bytes, of a file that is read as a whole; the published sidecar has 1.7 MB
_PIECE = 4 << 20  # bytes
_MAX_COUNT = 1 << 16  # of keys, of tensors
_MAX_NUMEL = 1 << 48
_MAX_NAME = 63  # bytes of a tensor's name, as ggml has it
_GGML_TYPES = frozenset(int(kind) for kind in GGMLQuantizationType)
_LONGEST_KEPT = 4096  # longer arrays and arrays of strings (vocabularies) are passed over unless they are asked for


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


def read_gguf_index(path: str | Path, keep: Collection[str] = ()) -> GgufIndex:
    """Keys and tensor list of any GGUF file; arrays of the keys in `keep` whatever their length, as vocabularies are.

    Raises LlamamemError if it is missing, not GGUF, or damaged.
    """
    path = Path(path)
    try:
        with open_regular(path) as file:
            at = _Cursor(file, os.fstat(file.fileno()).st_size)
            try:
                return _read_index(path, at, keep)
            except LlamamemError as e:
                raise LlamamemError(f"{path}: {e}; fetch it again") from None
    except FileNotFoundError:
        raise LlamamemError(f"{path}: no such file; check the path") from None
    except OSError as e:
        raise LlamamemError(f"{path}: cannot be read ({e.strerror}); give a readable .gguf file") from None


def read_gguf(path: str | Path, architectures: Sequence[str]) -> tuple[dict[str, GgufField], dict[str, GgufTensor]]:
    """Keys and tensors, in file order, of a whole file that follows docs/sidecar.md, stage 1.

    Raises LlamamemError with the reason, and with a text that does not name the file.
    """
    data = _read_whole(Path(path))
    at = _Cursor(io.BytesIO(data), len(data))
    n_tensors, n_fields = _read_counts(at)
    fields = _read_fields(at, n_fields, strict=True)
    found, known = fields.get("general.architecture"), " or ".join(f"'{name}'" for name in architectures)
    if found is None or found.type != GGUFValueType.STRING:
        raise _refused("not-a-sidecar", f"key 'general.architecture' is missing or no string, must be {known}")
    if found.value not in architectures:
        raise _refused(
            "not-a-sidecar",
            f"key 'general.architecture' is {quoted(found.value)}, must be {known}; is it the base model?",
        )
    alignment = fields.get("general.alignment")
    if alignment not in (None, GgufField(GGUFValueType.UINT32, ALIGNMENT)):
        raise _refused("alignment", f"key 'general.alignment' must be a u32 of {ALIGNMENT}")

    infos = _read_tensor_infos(at, n_tensors, ALIGNMENT, strict=True)
    tensors, start = {}, _padded(at.at, ALIGNMENT)
    for info in infos:
        n = prod(info.shape) * TYPE_SIZE[info.type.name]
        if n > len(data) - start:
            raise _refused("truncated", f"tensor {quoted(info.name)} ends at byte {start + n}, the file at {len(data)}")
        tensors[info.name] = GgufTensor(info.name, info.type.name, info.shape, data[start : start + n])
        start = _padded(start + n, ALIGNMENT)
    if len(data) > start:
        raise _refused("trailing-bytes", f"{len(data) - start} bytes follow the last tensor; copy or export it again")
    return fields, tensors


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
def replacing(path: Path, mode: int = 0o666) -> Iterator[Path]:
    """A new file beside `path` to write to; it replaces `path` when all went well and is removed when not.

    What was written, and that it was renamed, is on the disk on return. `mode` is subject to the umask.
    """
    if not path.parent.is_dir():
        raise LlamamemError(f"{path}: its directory does not exist; create it or give another --output")
    if path.is_dir():
        raise LlamamemError(f"{path}: is a directory; give a file name as --output")
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.unlink(missing_ok=True)  # of a dead process of our number, or a link that would be written through
        os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode))
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
        _flush_directory(path.parent)
    except OSError as e:
        raise LlamamemError(f"{path}: cannot be written ({e.strerror})") from None
    finally:
        part.unlink(missing_ok=True)


def _flush_directory(path: Path) -> None:
    """Waits until the names in a directory are on the disk: a rename may be lost without it."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _refused(reason: str, text: str) -> LlamamemError:
    return LlamamemError(text, reason=reason)


def _read_whole(path: Path) -> bytes:
    """At once, so that what is checked is what is used."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            # memory is taken for all that is asked for: never more than there is
            pieces = [file.read(size)] if size <= _MAX_FILE else []
            while size <= _MAX_FILE and (piece := file.read(_PIECE)):
                pieces.append(piece)
                size += len(piece)
    except FileNotFoundError:
        raise _refused("unreadable", "no such file; check the path") from None
    except OSError as e:
        raise _refused("unreadable", f"cannot be read ({e.strerror}); check the path") from None
    if size > _MAX_FILE:
        raise _refused("too-large", f"is over {_MAX_FILE >> 20} MiB, which no sidecar is; is it the base model?")
    return b"".join(pieces)


def _padded(n: int, alignment: int) -> int:
    return -(-n // alignment) * alignment


class _Cursor:
    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size, self.at = file, size, 0
        self.what = "the header"  # that is being read, for messages

    def _advance(self, n: int) -> None:
        if n > self.size - self.at:
            raise _refused("truncated", f"the file ends at byte {self.size}, inside of {self.what}: it is cut short")
        self.at += n

    def skip(self, n: int) -> None:
        self._advance(n)
        self.file.seek(self.at)

    def take(self, n: int) -> bytes:
        self._advance(n)
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
            raise _refused("not-utf8", f"{self.what} has a text that is not UTF-8: {_printable(data)}") from None


def _printable(data: bytes) -> str:
    return quoted(data[:81].decode("utf-8", "replace"))


def _read_index(path: Path, at: _Cursor, keep: Collection[str]) -> GgufIndex:
    n_tensors, n_fields = _read_counts(at)
    fields = _read_fields(at, n_fields, strict=False, keep=keep)
    alignment = fields["general.alignment"].value if "general.alignment" in fields else ALIGNMENT
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        raise LlamamemError(f"key 'general.alignment' is {quoted(str(alignment))}, must be a power of two")
    infos = _read_tensor_infos(at, n_tensors, alignment, strict=False)
    return GgufIndex(path, fields, infos, _padded(at.at, alignment))


def _read_counts(at: _Cursor) -> tuple[int, int]:
    """The start of the file: how many tensors, how many keys."""
    magic = at.take(min(4, at.size))
    if magic != b"GGUF":
        raise _refused("not-gguf", f"is not a GGUF file (it starts with {_printable(magic)})")
    version = at.number("I")
    if version != 3:
        raise _refused("gguf-version", f"GGUF version {version} is not supported, 3 is")
    n_tensors, n_fields = at.unpack("QQ")
    if n_tensors > _MAX_COUNT or n_fields > _MAX_COUNT:
        raise _refused("gguf-count", f"{n_tensors} tensors and {n_fields} keys, at most {_MAX_COUNT} of each are read")
    return n_tensors, n_fields


def _read_fields(at: _Cursor, n: int, strict: bool, keep: Collection[str] = ()) -> dict[str, GgufField]:
    fields: dict[str, GgufField] = {}
    for i in range(n):
        at.what = f"key {i + 1}"
        key = at.text()
        at.what = f"key {quoted(key)}"
        if key in fields:
            raise _refused("key-duplicate", f"{at.what} is there twice")
        fields[key] = _read_field(at, strict, key in keep)
    return fields


def _read_field(at: _Cursor, strict: bool, keep: bool) -> GgufField:
    kind = _value_type(at)
    if kind == GGUFValueType.STRING:
        return GgufField(kind, at.text())
    if kind != GGUFValueType.ARRAY:
        return GgufField(kind, at.number(_SCALARS[kind]))
    item = _value_type(at)
    if item == GGUFValueType.ARRAY:
        raise _refused("gguf-type", f"{at.what} is an array of arrays")
    n = at.number("Q")
    if item == GGUFValueType.STRING and keep:
        return GgufField(kind, [at.text() for _ in range(n)])
    if item == GGUFValueType.STRING:
        for _ in range(n):  # each takes some bytes of the file, whatever n is
            if strict:
                at.text()
            else:
                at.skip(at.number("Q"))
        return GgufField(kind, None)
    if n > _LONGEST_KEPT and not keep:
        at.skip(n * struct.calcsize(_SCALARS[item]))
        return GgufField(kind, None)
    return GgufField(kind, list(at.unpack(f"{n}{_SCALARS[item]}")))


def _value_type(at: _Cursor) -> GGUFValueType:
    number = at.number("I")
    try:
        return GGUFValueType(number)
    except ValueError:
        raise _refused("gguf-type", f"{at.what} has the unknown type {number}") from None


def _read_tensor_infos(at: _Cursor, n: int, alignment: int, strict: bool) -> list[GgufTensorInfo]:
    infos: list[GgufTensorInfo] = []
    names: set[str] = set()
    end = 0
    for i in range(n):
        at.what = f"tensor {i + 1}"
        info = _read_tensor_info(at, names, strict)
        if strict:
            if info.offset != end:
                raise _refused("tensor-offset", f"{at.what} is at offset {info.offset}, must be at {end}")
            end = _padded(end + prod(info.shape) * TYPE_SIZE[info.type.name], alignment)
        elif info.offset % alignment:
            raise LlamamemError(f"{at.what} starts at {info.offset}, not aligned to {alignment} bytes")
        names.add(info.name)
        infos.append(info)
    return infos


def _read_tensor_info(at: _Cursor, names: set[str], strict: bool) -> GgufTensorInfo:
    name = at.text()
    if strict and not 1 <= len(name.encode()) <= _MAX_NAME:
        raise _refused(
            "tensor-name",
            f"{at.what}: its name has {len(name.encode())} bytes, 1 to {_MAX_NAME} are legal: {quoted(name)}",
        )
    at.what = f"tensor {quoted(name)}"
    if name in names:
        raise _refused("tensor-duplicate", f"{at.what} is there twice")
    n_dims = at.number("I")
    if not 1 <= n_dims <= 4:
        raise _refused("tensor-dims", f"{at.what} has {n_dims} dimensions, 1 to 4 are legal")
    ne: list[int] = []
    for _ in range(n_dims):
        ne.append(at.number("Q"))
        if ne[-1] == 0 or prod(ne) > _MAX_NUMEL:
            raise _refused("tensor-dims", f"{at.what} has the impossible shape {[*reversed(ne)]}")
    number = at.number("I")
    kind = GGMLQuantizationType(number) if number in _GGML_TYPES else None
    if kind is None or (strict and kind.name not in TYPE_SIZE):
        raise _refused(
            "tensor-type", f"{at.what} has type {kind.name if kind else number}; BF16, F16 and F32 are legal"
        )
    return GgufTensorInfo(name, tuple(reversed(ne)), kind, at.number("Q"))
