"""A memory as the server hands it out, the setting it is read under, and when two memories are the same."""

from __future__ import annotations

import base64
import hashlib
import struct
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from llamamem.formats.state.block import CHECKSUM, TRAILER, VERSION, Header

HEAD = 12 + 320  # bytes of a memory-only file before its values: llama.cpp's head, the block's header

# Rounding differs with the shape of a batch: on the demo model, one token at a time against many, mostly by less than
# 1e-3 of a layer's largest value, and after a hundred tokens that mean nothing by up to 2.5e-3. Another origin moves it
# by 6e-2 and more, which a run measures before it begins.
RELATIVE, ABSOLUTE = 5e-3, 1e-5


class Setting(NamedTuple):
    """How a memory is read and written."""

    frozen: bool = False
    scale: float = 1.0

    def under(self, frozen: bool | None, scale: float | None) -> Setting:
        """This setting for a request that says so: what it leaves out stays."""
        return Setting(self.frozen if frozen is None else frozen, self.scale if scale is None else float(scale))


PLAIN = Setting()


@dataclass(frozen=True)
class Memory:
    """The bytes of a memory-only state file (docs/state-format.md); none of them for the empty memory."""

    data: bytes = b""

    @classmethod
    def of(cls, text: str) -> Memory:
        return cls(base64.b64decode(text, validate=True))

    @property
    def base64(self) -> str:
        return base64.b64encode(self.data).decode()

    @cached_property
    def values(self) -> np.ndarray:
        """f32 [layers, values]; the last two of a layer are the counter."""
        layers = Header.unpack(self.data[12:HEAD]).layers
        return np.frombuffer(self.data[HEAD : -TRAILER.size], "<f4").reshape(layers, -1)

    @cached_property
    def written(self) -> int:
        """Tokens written, in every layer."""
        if not self.data:
            return 0
        low, laps = self.values[:, -2], self.values[:, -1]
        counts = set((low + laps * Header.unpack(self.data[12:HEAD]).period).astype(int).tolist())
        return counts.pop() if len(counts) == 1 else -1

    @cached_property
    def origin(self) -> str | None:
        """The hash under which the server knows it as an origin; None for an empty one."""
        if not self.data or not self.values.any():
            return None
        return hashlib.sha256(self.data[HEAD : -TRAILER.size]).hexdigest()

    def __repr__(self) -> str:
        return f"memory {self.origin[:8]} of {self.written}" if self.origin else "no memory"


EMPTY = Memory()


def distance(found: Memory, expected: Memory) -> float:
    """The largest difference of a value, in units of what rounding may do: at most 1 is the same memory."""
    if not expected.origin or not found.origin:
        return 0.0 if found.origin == expected.origin else float("inf")
    a, b = found.values[:, :-2].astype(np.float64), expected.values[:, :-2].astype(np.float64)
    if a.shape != b.shape or not np.isfinite(a).all():
        return float("inf")
    allowed = ABSOLUTE + RELATIVE * np.abs(b).max(axis=1, keepdims=True)
    return float((np.abs(a - b) / allowed).max())


def differ(found: Memory, expected: Memory) -> str | None:
    """What is wrong with a memory, None if it is the expected one."""
    if found.data and not np.isfinite(found.values).all():
        return "a value is not finite"
    if found.written != expected.written:
        return f"{found.written} tokens written, {expected.written} expected"
    far = distance(found, expected)
    return None if far <= 1 else f"{far:.1f} times further off than rounding"


def text_hash(ids: tuple[int, ...]) -> str:
    """As the server names a text: of its token ids as little-endian i32."""
    return hashlib.sha256(struct.pack(f"<{len(ids)}i", *ids)).hexdigest()


def with_values(memory: Memory, value: float) -> Memory:
    """The same file with that in all matrices, and right checksums; 0 makes it empty."""
    values = memory.values.copy()
    values[:, :-2] = value
    values[:, -2:] *= value != 0
    block = bytearray(memory.data[12:HEAD] + values.tobytes())
    block[CHECKSUM] = bytes(32)
    block[CHECKSUM] = hashlib.sha256(block).digest()
    body = memory.data[:12] + bytes(block)
    return Memory(body + TRAILER.pack(b"RMVE", VERSION, len(body), hashlib.sha256(body).digest()))
