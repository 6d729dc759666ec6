"""The metadata of a GGUF, read without loading it: enough to refuse a wrong file and to estimate its memory."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, BinaryIO

from llamamem.errors import LlamamemError

# GGUF value type -> struct code (8 is a string, 9 an array)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_LONGEST_KEPT = 4096  # arrays beyond this (vocabularies) are skipped


def read_gguf_header(path: Path, what: str) -> dict[str, Any]:
    """Metadata by key; arrays of strings or of more than 4096 items are None. `what` names the file in errors.

    Raises LlamamemError when the file is missing, unreadable, not GGUF, of another GGUF version, or cut short.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(4)
            if magic != b"GGUF":
                raise LlamamemError(f"{what} {path}: not a GGUF file (it starts with {magic!r}); give a .gguf file")
            version = _scalar(file, "I")
            if version not in (2, 3):
                raise LlamamemError(f"{what} {path}: GGUF version {version} is not supported; convert it to version 3")
            _scalar(file, "Q")  # number of tensors
            n_fields = _scalar(file, "Q")
            return {_string(file): _value(file, _scalar(file, "I")) for _ in range(n_fields)}
    except (EOFError, KeyError, UnicodeDecodeError) as e:
        raise LlamamemError(f"{what} {path}: its GGUF header is cut short or damaged; fetch the file again") from e
    except FileNotFoundError as e:
        raise LlamamemError(f"{what} {path}: no such file; check the path") from e
    except OSError as e:
        raise LlamamemError(f"{what} {path}: cannot be read ({e.strerror}); give a readable .gguf file") from e


def _read(file: BinaryIO, n: int) -> bytes:
    data = file.read(n)
    if len(data) != n:
        raise EOFError
    return data


def _scalar(file: BinaryIO, code: str) -> Any:
    return struct.unpack("<" + code, _read(file, struct.calcsize(code)))[0]


def _string(file: BinaryIO) -> str:
    n = _scalar(file, "Q")
    if n > 1 << 26:
        raise EOFError
    return _read(file, n).decode("utf-8")


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == 8:
        return _string(file)
    if kind != 9:
        return _scalar(file, _SCALARS[kind])
    item, n = _scalar(file, "I"), _scalar(file, "Q")
    if item == 8:
        for _ in range(n):
            file.seek(_scalar(file, "Q"), 1)
        return None
    size = struct.calcsize(_SCALARS[item])
    if n > _LONGEST_KEPT:
        file.seek(size * n, 1)
        return None
    return list(struct.unpack(f"<{n}{_SCALARS[item]}", _read(file, size * n)))
