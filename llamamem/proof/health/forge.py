"""State files that must be refused, made from one that the server saved: damaged ones, and those of another model."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

from llamamem.formats.state.block import CHECKSUM, TRAILER, VERSION, Header

_HEADER = 320  # bytes


@dataclass(frozen=True)
class Forged:
    """`memory_only`: it goes to memory-restore. `reason` is that of docs/state-format.md."""

    what: str
    data: bytes
    reason: str
    memory_only: bool = False


def damaged(sequence: bytes, memory: bytes) -> tuple[Forged, ...]:
    """One flipped byte in each part, and a cut; the checks of the file and of the block are hit by turns."""
    block, header = _block(sequence)
    cells = block + _HEADER + header.cell_bytes // 2
    kv = len(sequence) - TRAILER.size - max(1, header.kv_bytes // 2)
    alone = _block(memory)[0]
    return (
        Forged("one byte of the identity flipped", _flip(sequence, block + 56), "state-checksum"),
        Forged("one byte of the memory flipped", _flip(sequence, cells), "state-checksum"),
        Forged("the same, with the hash of the file right", _sealed(_flip(sequence, cells)), "state-checksum"),
        Forged("one byte of the KV cache flipped", _flip(sequence, kv), "state-checksum"),
        Forged("the end cut off", sequence[: kv + 1], "state-truncated"),
        Forged("one byte of a memory alone flipped", _flip(memory, alone + _HEADER), "state-checksum", True),
        Forged("the end of a memory alone cut off", memory[:-1], "state-truncated", True),
    )


def foreign(sequence: bytes, memory: bytes) -> tuple[Forged, ...]:
    """Sound in every byte, of another sidecar or base."""
    other = hashlib.sha256(b"another file").digest()
    return (
        Forged("a state of another sidecar", _of(sequence, sidecar=other), "state-identity"),
        Forged("a state of another base", _of(sequence, base=other), "state-identity"),
        Forged("a memory alone of another sidecar", _of(memory, sidecar=other), "state-identity", True),
    )


def _block(data: bytes) -> tuple[int, Header]:
    """Where the memory block of a file begins, and its header."""
    start = 12 + 4 * int.from_bytes(data[8:12], "little")
    return start, Header.unpack(data[start : start + _HEADER])


def _flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def _sealed(data: bytes) -> bytes:
    body = data[: -TRAILER.size]
    return body + TRAILER.pack(b"RMVE", VERSION, len(body), hashlib.sha256(body).digest())


def _of(data: bytes, *, sidecar: bytes | None = None, base: bytes | None = None) -> bytes:
    start, header = _block(data)
    sidecar, base = sidecar or header.sidecar, base or header.base
    fingerprint = hashlib.sha256(sidecar + base).digest()
    header = replace(header, sidecar=sidecar, base=base, fingerprint=fingerprint, checksum=bytes(32))
    end = start + _HEADER + header.cell_bytes
    block = bytearray(header.pack() + data[start + _HEADER : end])
    block[CHECKSUM] = hashlib.sha256(block).digest()
    return _sealed(data[:start] + bytes(block) + data[end:])
