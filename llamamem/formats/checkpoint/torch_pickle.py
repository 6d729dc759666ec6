"""The pickle inside of a .pt file, opcode by opcode: what torch.save writes, without torch.

The pickler of the standard library cannot name what is not installed.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable, Iterable

from llamamem.formats.gguf_file import TYPE_SIZE, GgufTensor

_STORAGES = {"F32": "FloatStorage", "BF16": "BFloat16Storage", "F16": "HalfStorage"}


def torch_pickle(tensors: Iterable[GgufTensor]) -> bytes:
    """The pickle of a dict of contiguous CPU tensors, each with a storage of its own: `data/0`, `data/1`, ...

    Up to 1000 tensors the bytes are torch's; beyond that it sets them in batches, which reads the same.
    """
    w = _Writer()
    w.write(pickle.PROTO + b"\x02" + pickle.EMPTY_DICT)
    w.remember()
    members = list(enumerate(tensors))
    w.write(pickle.MARK if len(members) > 1 else b"")
    for i, tensor in members:
        w.text(tensor.name)
        _tensor(w, str(i), tensor)
    w.write({0: b"", 1: pickle.SETITEM}.get(len(members), pickle.SETITEMS))
    w.write(pickle.STOP)
    return bytes(w.out)


def _tensor(w: _Writer, key: str, tensor: GgufTensor) -> None:
    """`_rebuild_tensor_v2(storage, offset, shape, stride, requires_grad, hooks)`, the storage by its persistent id."""
    w.reference("torch._utils", "_rebuild_tensor_v2")
    w.write(pickle.MARK + pickle.MARK)
    w.constant("storage")
    w.reference("torch", _STORAGES[tensor.dtype])
    w.text(key)
    w.constant("cpu")
    w.integer(len(tensor.data) // TYPE_SIZE[tensor.dtype])
    w.write(pickle.TUPLE)
    w.remember()
    w.write(pickle.BINPERSID)
    w.integer(0)
    w.integers(tensor.shape)
    w.integers(_stride(tensor.shape))
    w.write(pickle.NEWFALSE)
    w.reference("collections", "OrderedDict")
    w.write(pickle.EMPTY_TUPLE + pickle.REDUCE)
    w.remember()
    w.write(pickle.TUPLE)
    w.remember()
    w.write(pickle.REDUCE)
    w.remember()


def _stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1] * len(shape)
    for i in range(len(shape) - 1, 0, -1):
        strides[i - 1] = strides[i] * shape[i]
    return tuple(strides)


class _Writer:
    """Opcodes of protocol 2. What a pickler remembers has a number; a second use is by that number."""

    def __init__(self) -> None:
        self.out = bytearray()
        self.n = 0  # remembered so far
        self.numbers: dict[tuple[str, ...], int] = {}

    def write(self, data: bytes) -> None:
        self.out += data

    def remember(self) -> None:
        self.write(self._numbered(pickle.BINPUT, pickle.LONG_BINPUT, self.n))
        self.n += 1

    def text(self, text: str) -> None:
        data = text.encode("utf-8")
        self.write(pickle.BINUNICODE + struct.pack("<I", len(data)) + data)
        self.remember()

    def constant(self, text: str) -> None:
        self._once((text,), lambda: self.text(text))

    def reference(self, module: str, name: str) -> None:
        def spell() -> None:
            self.write(pickle.GLOBAL + f"{module}\n{name}\n".encode())
            self.remember()

        self._once((module, name), spell)

    def integer(self, n: int) -> None:
        if n < 1 << 8:
            self.write(pickle.BININT1 + struct.pack("<B", n))
        elif n < 1 << 16:
            self.write(pickle.BININT2 + struct.pack("<H", n))
        elif n < 1 << 31:
            self.write(pickle.BININT + struct.pack("<i", n))
        else:
            data = pickle.encode_long(n)
            self.write(pickle.LONG1 + bytes([len(data)]) + data)

    def integers(self, numbers: tuple[int, ...]) -> None:
        end = {0: pickle.EMPTY_TUPLE, 1: pickle.TUPLE1, 2: pickle.TUPLE2, 3: pickle.TUPLE3}.get(len(numbers))
        self.write(b"" if end else pickle.MARK)
        for n in numbers:
            self.integer(n)
        self.write(end or pickle.TUPLE)
        if numbers:  # there is but one empty tuple, and it is not remembered
            self.remember()

    def _once(self, key: tuple[str, ...], spell: Callable[[], None]) -> None:
        if key in self.numbers:
            self.write(self._numbered(pickle.BINGET, pickle.LONG_BINGET, self.numbers[key]))
            return
        self.numbers[key] = self.n
        spell()

    @staticmethod
    def _numbered(short: bytes, long: bytes, n: int) -> bytes:
        return short + struct.pack("<B", n) if n < 1 << 8 else long + struct.pack("<I", n)
