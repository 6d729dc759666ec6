"""The bytes of a state file, read once from front to back: docs/state-format.md, stage by stage.

What is raised here names no file: `read_state` adds the path.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import BinaryIO, cast

from llamamem.errors import LlamamemError
from llamamem.formats.regular import open_regular

SEQUENCE, CONTEXT, CHECKPOINT, MEMORY = 1, 2, 3, 4
KINDS = {SEQUENCE: "sequence", CONTEXT: "context", CHECKPOINT: "checkpoint", MEMORY: "memory"}
# flags: computed from other states; the cells are followed by what they started with; a setting for a provenance
MADE_BY_TOOL, ORIGINS, SETTING = 1, 2, 4

# in the order of the checks, with the meaning in short
STATE_REASONS = {
    "state-unreadable": "the file cannot be opened or read",
    "state-format": "the file is not a saved state of this llama.cpp",
    "state-no-memory": "the state was saved without a memory",
    "state-has-memory": "the state has a memory and the model has none",
    "state-version": "the memory block or the trailer is of a version that is not known",
    "state-truncated": "the file is shorter or longer than it says",
    "state-checksum": "the bytes are not those that were saved",
    "state-identity": "the state belongs to another sidecar or base",
    "state-kind": "the state is of a kind that does not go here",
    "state-shape": "the memory has another shape",
    "state-values": "the memory holds a NaN, an infinity or an impossible counter",
    "state-kv": "the KV cache cannot take what was saved",
    "state-unwritable": "a file cannot be written there",
}

GGSQ, GGSN = 0x67677371, 0x6767736E
LLAMA_VERSION = {GGSQ: 3, GGSN: 10}  # LLAMA_STATE_SEQ_VERSION and LLAMA_SESSION_VERSION of the pinned llama.cpp
VERSION = 1
CHECKSUM = slice(88, 120)
TRAILER = struct.Struct("<4sIQ32s")  # RMVE, version, bytes before it, their hash

_HEADER = struct.Struct("<4s11IQ32s32sI4s32s32s128s")
LARGE_FILE = 64 << 20  # bytes from which the header is checked before the body is read
_PIECE = 1 << 20
_NO_MEMORY = "has no memory block: it was saved without a sidecar"


def refused(reason: str, text: str) -> LlamamemError:
    return LlamamemError(text, reason=reason)


@dataclass(frozen=True, kw_only=True)
class Header:
    """The header of a memory block, in the order of its bytes."""

    magic: bytes = b"RMVS"
    version: int = VERSION
    header_bytes: int = _HEADER.size
    kind: int
    layers: int
    heads: int
    states: int
    rank: int
    chunk: int
    semantics: int  # of an RWKV-MS; 0: a delta rule
    cells: int
    values: int  # f32, of one layer of a cell
    kv_bytes: int = 0
    fingerprint: bytes
    checksum: bytes = bytes(32)
    flags: int = 0
    reserved: bytes = bytes(4)
    sidecar: bytes
    base: bytes
    provenance: bytes = b""  # padded with zeros to 128 bytes; with SETTING f32 scale, u32 frozen, u64 hash of LoRAs

    def pack(self) -> bytes:
        return _HEADER.pack(*astuple(self))

    @classmethod
    def unpack(cls, data: bytes) -> Header:
        return cls(**dict(zip((f.name for f in fields(cls)), _HEADER.unpack(data), strict=True)))

    @property
    def period(self) -> int:
        """Tokens until the first state is written to again."""
        return self.states * self.chunk

    @property
    def matrices(self) -> int:
        """f32 values of the matrices of one layer of a cell."""
        return self.heads * self.states * self.rank**2

    @property
    def prev(self) -> int:
        """f32 values of the source of the last token, of one layer of a cell: a delta rule has none."""
        return self.heads * self.rank if self.semantics else 0

    @property
    def cell_bytes(self) -> int:
        """Bytes of all cells, and of their origins."""
        return 4 * self.cells * self.layers * self.values * (2 if self.flags & ORIGINS else 1)


@dataclass(frozen=True)
class RawState:
    """A file whose bytes are those that were saved; what they mean is not checked yet."""

    magic: int
    token_ids: bytes
    architecture: str
    header: Header
    cells: bytes
    sha256: str  # of the whole file
    size: int


def read_raw(
    file: BinaryIO,
    size: int,
    progress: Callable[[int], None] | None = None,
    check: Callable[[int, Header, int], None] | None = None,
) -> RawState:
    """Everything up to `state-checksum`: what surrounds the block, then the block. The KV cache is not kept.

    `check` gets the magic, the header and the number of tokens of a large file before its body is read, and refuses
    what it will be refused for whatever that holds.
    """
    at = _Cursor(file, size)
    magic, version = at.u32("the magic"), at.u32("llama.cpp's version")
    if magic not in LLAMA_VERSION:
        raise refused("state-format", "is not a state that llama.cpp saved")
    if version != LLAMA_VERSION[magic]:
        raise refused("state-format", f"is a state of version {version} of llama.cpp's, must be {LLAMA_VERSION[magic]}")
    n_tokens = at.u32("the number of tokens")
    start = at.at
    at.skip(4 * n_tokens, "the token ids")
    digest = _check_trailer(at)
    if size > LARGE_FILE and check is not None:
        early = _Cursor(file, size - TRAILER.size, at.at)
        check(magic, _take_header(early, magic)[1], n_tokens)
    whole, sha256 = _hashes(file, size, progress or (lambda n: None))
    if whole != digest:
        raise refused("state-checksum", "its bytes are not those that were saved; it is damaged")

    at = _Cursor(file, size - TRAILER.size, start)
    token_ids = at.take(4 * n_tokens, "the token ids")
    packed, header, name = _take_header(at, magic)
    cells = at.take(header.cell_bytes, "the cells")
    block = packed[: CHECKSUM.start] + bytes(32) + packed[CHECKSUM.stop :] + cells
    if hashlib.sha256(block).digest() != header.checksum:
        raise refused("state-checksum", "its memory block is not the one that was saved; it is damaged")
    return RawState(magic, token_ids, name.decode(errors="replace"), header, cells, sha256, size)


def _take_header(at: _Cursor, magic: int) -> tuple[bytes, Header, bytes]:
    """The bytes of the block's header, what they say, and the architecture's name before them."""
    name = at.take(at.u32("the length of a name"), "the architecture's name") if magic == GGSN else b""
    # of a header that is cut, what there is decides
    packed = at.peek(at.at, min(_HEADER.size, at.size - at.at)).ljust(_HEADER.size, b"\0")
    header = Header.unpack(packed)
    if header.magic != b"RMVS":
        raise refused("state-no-memory", _NO_MEMORY)
    if (header.version, header.header_bytes) != (VERSION, _HEADER.size):
        text = f"its memory block is of version {header.version} with a header of {header.header_bytes} bytes"
        raise refused("state-version", f"{text}, must be {VERSION} with {_HEADER.size}")
    at.skip(_HEADER.size, "the header of the memory block")
    if header.cell_bytes + header.kv_bytes != at.size - at.at:
        text = f"its header says {header.cell_bytes} bytes of cells and {header.kv_bytes} of KV cache"
        raise refused("state-truncated", f"{text}, the file has {at.size - at.at} of both")
    return packed, header, name


def is_memory_file(path: Path) -> bool:
    """Whether a file begins as one of kind 4 does; it may be damaged all the same."""
    try:
        with open_regular(path) as file:
            start = file.read(28)
    except OSError:
        return False
    memory = struct.pack("<4I", GGSQ, LLAMA_VERSION[GGSQ], 0, MEMORY)
    return start[:12] + start[24:] == memory and start[12:16] == b"RMVS"


def _check_trailer(at: _Cursor) -> bytes:
    """The hash that it gives for what stands before it. `at` stands behind the token ids and stays there."""
    fits = at.size - at.at >= TRAILER.size
    packed = at.peek(at.size - TRAILER.size, TRAILER.size) if fits else bytes(TRAILER.size)
    magic, version, count, digest = TRAILER.unpack(packed)
    if magic != b"RMVE":
        # one that was saved without a memory has none; in a whole context the architecture's name comes first
        first = at.peek(at.at, 64)
        if len(first) == 64 and b"RMVS" not in first:
            raise refused("state-no-memory", _NO_MEMORY)
        raise refused("state-truncated", "does not end with a trailer: it is cut, or something was added")
    if version != VERSION:
        raise refused("state-version", f"its trailer is of version {version}, must be {VERSION}")
    if count != at.size - TRAILER.size:
        raise refused("state-truncated", f"has {at.size - TRAILER.size} bytes before its trailer, which says {count}")
    return cast(bytes, digest)


def _hashes(file: BinaryIO, size: int, progress: Callable[[int], None]) -> tuple[bytes, str]:
    """SHA-256 of what stands before the trailer, and in hex that of the whole file; read in pieces."""
    file.seek(0)
    hashed, left = hashlib.sha256(), size - TRAILER.size
    while piece := file.read(min(left, _PIECE)):
        hashed.update(piece)
        left -= len(piece)
        progress(len(piece))
    before = hashed.digest()
    hashed.update(file.read(TRAILER.size))
    return before, hashed.hexdigest()


class _Cursor:
    """Reads front to back; what ends beyond `size` is `state-truncated`."""

    def __init__(self, file: BinaryIO, size: int, at: int = 0) -> None:
        self.file, self.size, self.at = file, size, at
        file.seek(at)

    def skip(self, n: int, what: str) -> None:
        if n > self.size - self.at:
            raise refused("state-truncated", f"ends within {what}")
        self.at += n
        self.file.seek(self.at)

    def take(self, n: int, what: str) -> bytes:
        data = self.file.read(n) if n <= self.size - self.at else b""
        if len(data) != n:
            raise refused("state-truncated", f"ends within {what}")
        self.at += n
        return data

    def u32(self, what: str) -> int:
        return int.from_bytes(self.take(4, what), "little")

    def peek(self, start: int, n: int) -> bytes:
        """n bytes from `start`, without going there."""
        self.file.seek(start)
        data = self.file.read(n)
        self.file.seek(self.at)
        return data
