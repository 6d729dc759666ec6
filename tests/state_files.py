"""State files made with struct alone, to be read, and to be broken on purpose."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass, field

import numpy as np

SIDECAR, BASE = "5a" * 32, "ba" * 32
LAYERS, N, M, R, C = 2, 2, 3, 2, 5
VALUES = N * M * R * R + N * R + 2


@dataclass
class StateFile:
    """Parts of a file; `bytes()` puts them together, with every hash right."""

    kind: int = 4
    cells: int = 1
    seed: int = 0
    token_ids: tuple[int, ...] = ()
    kv: bytes = b""
    origins: bool = False
    header: dict[int, bytes] = field(default_factory=dict)  # by offset: what stands there instead
    values: dict[int, float] = field(default_factory=dict)  # by index among all values of the cells

    @property
    def prefix(self) -> bytes:
        version = 10 if self.kind == 2 else 3
        magic = b"nsgg" if self.kind == 2 else b"qsgg"
        name = struct.pack("<I", 6) + b"gemma4" if self.kind == 2 else b""
        return magic + struct.pack(f"<2I{len(self.token_ids)}i", version, len(self.token_ids), *self.token_ids) + name

    def cell_values(self) -> np.ndarray:
        """f32 [cells, LAYERS, VALUES]; the counters are of 3 to 36 tokens, not the same for all."""
        count = self.cells * (2 if self.origins else 1)
        values = np.random.default_rng(self.seed).normal(size=(count, LAYERS, VALUES)).astype("<f4")
        values[..., -2] = np.arange(3, 3 + count)[:, None] % (M * C)
        values[..., -1] = np.arange(count)[:, None] % 3
        return values

    def block(self) -> bytes:
        values = self.cell_values()
        for index, value in self.values.items():
            values.reshape(-1)[index] = value
        sidecar, base = bytes.fromhex(SIDECAR), bytes.fromhex(BASE)
        header = bytearray(
            struct.pack("<4s11IQ", b"RMVS", 1, 320, self.kind, LAYERS, N, M, R, C, 2, self.cells, VALUES, len(self.kv))
            + hashlib.sha256(sidecar + base).digest()
            + bytes(32)
            + struct.pack("<2I", 2 if self.origins else 0, 0)
            + sidecar
            + base
            + bytes(128)
        )
        for offset, data in self.header.items():
            header[offset : offset + len(data)] = data
        block = header + values.tobytes()
        if 88 not in self.header:
            block[88:120] = hashlib.sha256(block).digest()
        return bytes(block)

    def bytes(self) -> bytes:
        return seal(self.prefix + self.block() + self.kv)


def seal(body: bytes) -> bytes:
    """A file of these bytes: its trailer is right."""
    return body + struct.pack("<4sIQ", b"RMVE", 1, len(body)) + hashlib.sha256(body).digest()


def edited(data: bytes, header: dict[int, bytes]) -> bytes:
    """A real file with other bytes in the header of its block, by offset there, and every hash right again."""
    at = data.index(b"RMVS")
    (kv,) = struct.unpack_from("<Q", data, at + 48)
    block, rest = bytearray(data[at : len(data) - 48 - kv]), data[len(data) - 48 - kv : len(data) - 48]
    for offset, value in header.items():
        block[offset : offset + len(value)] = value
    if 56 not in header:
        block[56:88] = hashlib.sha256(block[128:192]).digest()
    block[88:120] = bytes(32)
    block[88:120] = hashlib.sha256(block).digest()
    return seal(data[:at] + bytes(block) + rest)


def u32(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}I", *values)


MEMORY = StateFile()
SEQUENCE = StateFile(kind=1, seed=1, token_ids=(2, 105, 7), kv=bytes(range(200)), origins=True)
CONTEXT = StateFile(kind=2, cells=3, seed=2, token_ids=(2, 9), kv=bytes(100))
