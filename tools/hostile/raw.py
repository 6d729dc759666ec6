"""A sidecar as parts that compose to bytes, and of which any can be wrong, as no writer of GGUF allows it.

`sound()` is the smallest sound one: rank 1, one state head, H = 2, L = 1, all values finite and none of them zero.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)  # types of keys
SCALARS = dict(zip((U8, I8, U16, I16, U32, I32, F32, BOOL, U64, I64, F64), "BbHhIif?Qqd", strict=True))
TENSOR_F32, TENSOR_F16, TENSOR_BF16 = 0, 1, 30
TENSOR_TYPES = {TENSOR_F32: "F32", TENSOR_F16: "F16", TENSOR_BF16: "BF16"}

SCHEMA = "delta_mem_rwkv_ms_memory_gguf_sidecar.v"
VECTORS = ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "w0", "a0", "k_k", "k_a", "ln_x.weight", "ln_x.bias")
PEOPLE = (
    *("status", "memory_type", "base_model", "checkpoint_repo", "base_gguf", "mmproj_gguf", "mmproj_gguf_sha256"),
    *("adapter_metadata_json", "required_runtime_hooks_json"),
)
SOURCE_PREFIX = "model.language_model.layers."
H = 2
WIDTH = {"q": 3, "k": 1, "v": 1, "o": H}


class Piece(NamedTuple):
    """A field of the file: of the `file`, a `key`, a `tensor`'s description, or its `data`; and whose it is."""

    kind: str
    owner: str
    part: str
    data: bytes


@dataclass
class Key:
    """`value` is a number, a text, what becomes JSON, or the very bytes; `length` and `name` may lie."""

    name: str | bytes
    type: int
    value: Any
    length: int | None = None

    def encoded(self) -> bytes:
        """The value as it stands in the file."""
        if isinstance(self.value, bytes):
            return self.value
        if self.type in SCALARS:
            return struct.pack(f"<{SCALARS[self.type]}", self.value)
        return string(self.value if isinstance(self.value, str) else dumps(self.value))


@dataclass
class Tensor:
    """`dims` are in ggml's order; an offset of None is the one that belongs there."""

    name: str | bytes
    dims: list[int]
    type: int
    data: bytes
    offset: int | None = None
    length: int | None = None
    n_dims: int | None = None


@dataclass
class Sidecar:
    """Parts in the order of the file. Counts of None are the true ones."""

    keys: list[Key] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    magic: bytes = b"GGUF"
    version: int = 3
    n_tensors: int | None = None
    n_keys: int | None = None
    tail: bytes = b""
    cut: int = 0  # bytes left out at the end

    def key(self, name: str) -> Key:
        """A key by its name without `delta_mem.` or `memory_adapter.`, or by the whole of it."""
        return next(key for key in self.keys if key.name in (name, f"delta_mem.{name}", f"memory_adapter.{name}"))

    def tensor(self, name: str) -> Tensor:
        """A tensor by its name."""
        return next(tensor for tensor in self.tensors if tensor.name == name)

    @property
    def config(self) -> dict[str, Any]:
        """What config_json holds, to be changed in place."""
        return self.key("config_json").value

    @property
    def attention(self) -> list[Any]:
        """What per_layer_attention_json holds."""
        return self.key("per_layer_attention_json").value

    @property
    def manifest(self) -> list[Any]:
        """What tensor_manifest_json holds."""
        return self.key("tensor_manifest_json").value

    def settle(self) -> None:
        """Makes manifest and counts those of the tensors."""
        found = [key.value for key in self.keys if key.name == "memory_adapter.source_prefix"]
        prefix = found[0] if found and isinstance(found[0], str) else SOURCE_PREFIX
        if not isinstance(self.manifest, list):  # after an edit; from Python 3.12 on a dict takes a slice for a key
            raise TypeError("the manifest is no list")
        self.manifest[:] = [manifest_entry(tensor, prefix) for tensor in self.tensors]
        self.key("tensor_count").value = len(self.tensors)
        self.key("total_numel").value = sum(prod(tensor.dims) for tensor in self.tensors)
        self.key("total_bytes").value = sum(len(tensor.data) for tensor in self.tensors)

    def pieces(self) -> Iterator[Piece]:
        """The file, field by field."""
        size = 0

        def piece(kind: str, owner: str | bytes, part: str, data: bytes) -> Piece:
            nonlocal size
            size += len(data)
            return Piece(kind, owner if isinstance(owner, str) else repr(owner), part, data)

        yield piece("file", "file", "magic", self.magic)
        yield piece("file", "file", "version", u32(self.version))
        yield piece("file", "file", "tensor-count", u64(_or(self.n_tensors, len(self.tensors))))
        yield piece("file", "file", "key-count", u64(_or(self.n_keys, len(self.keys))))
        for key in self.keys:
            name, value = _bytes(key.name), key.encoded()
            yield piece("key", key.name, "length", u64(_or(key.length, len(name))))
            yield piece("key", key.name, "name", name)
            yield piece("key", key.name, "type", u32(key.type))
            if key.type == STRING:
                yield piece("key", key.name, "string-length", value[:8])
                value = value[8:]
            yield piece("key", key.name, "value", value)
        offset = 0
        for tensor in self.tensors:
            name = _bytes(tensor.name)
            yield piece("tensor", tensor.name, "length", u64(_or(tensor.length, len(name))))
            yield piece("tensor", tensor.name, "name", name)
            yield piece("tensor", tensor.name, "n-dims", u32(_or(tensor.n_dims, len(tensor.dims))))
            yield piece("tensor", tensor.name, "dims", b"".join(map(u64, tensor.dims)))
            yield piece("tensor", tensor.name, "type", u32(tensor.type))
            yield piece("tensor", tensor.name, "offset", u64(_or(tensor.offset, offset)))
            offset += len(tensor.data) + len(padding(len(tensor.data)))
        yield piece("file", "file", "padding", padding(size))
        for tensor in self.tensors:
            yield piece("data", tensor.name, "data", tensor.data)
            yield piece("data", tensor.name, "padding", padding(len(tensor.data)))
        yield piece("file", "file", "tail", self.tail)

    def compose(self) -> bytes:
        """The file."""
        data = b"".join(piece.data for piece in self.pieces())
        return data[: len(data) - self.cut]


def u32(value: int) -> bytes:
    """Little-endian."""
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    """Little-endian."""
    return struct.pack("<Q", value)


def string(text: str | bytes, length: int | None = None) -> bytes:
    """A string of GGUF; its length may lie."""
    return u64(_or(length, len(_bytes(text)))) + _bytes(text)


def array(item: int, items: bytes, count: int) -> bytes:
    """An array of GGUF; its count may lie."""
    return u32(item) + u64(count) + items


def padding(size: int) -> bytes:
    """What follows `size` bytes up to a multiple of 32."""
    return bytes(-size % 32)


def dumps(value: Any) -> str:
    """JSON without spaces."""
    return json.dumps(value, separators=(",", ":"))


def values(name: str, n: int, kind: int) -> bytes:
    """n values between 0.5 and 1."""
    first = zlib.crc32(name.encode()) % 32
    if kind == TENSOR_F32:
        return struct.pack(f"<{n}f", *(0.5 + (first + i) / 128 for i in range(n)))
    start = {TENSOR_F16: 0x3800, TENSOR_BF16: 0x3F00}[kind]
    return struct.pack(f"<{n}H", *(start + first + i for i in range(n)))


def new_tensor(name: str, shape: Sequence[int], kind: int = TENSOR_BF16) -> Tensor:
    """A tensor of finite values; `shape` is torch's."""
    return Tensor(name, list(reversed(shape)), kind, values(name, prod(shape), kind))


def manifest_entry(tensor: Tensor, prefix: str = SOURCE_PREFIX) -> dict[str, Any]:
    """What the manifest says of a tensor."""
    name = tensor.name if isinstance(tensor.name, str) else tensor.name.decode("utf-8", "replace")
    return {
        "name": name,
        "source_name": source_name(name, prefix),
        "shape": tensor.dims[::-1],
        "gguf_type": TENSOR_TYPES.get(tensor.type, "BF16"),
        "numel": prod(tensor.dims),
        "bytes": len(tensor.data),
        "sha256_raw": hashlib.sha256(tensor.data).hexdigest(),
    }


def source_name(name: str, prefix: str = SOURCE_PREFIX) -> str:
    """The name in the checkpoint."""
    blk, layer, short = [*name.split(".", 2), "", ""][:3]
    if blk != "blk":
        return name
    tails = {f"mem_{x}": f"memory_{x}_proj" for x in "qkv"}
    tails |= {
        f"{gate}{b}": f"{gate}{tail}" for gate in ("beta", "lambda") for b, tail in (("", "_proj"), ("_b", "_bias"))
    }
    tails |= {"delta_scale": "delta_scale_raw", "delta_o_norm": "delta_o_rmsnorm_weight"}
    tail = tails.get(short, f"{short}_proj")
    if short.startswith("rwkv."):
        tail = f"hrm_rwkv7_core.{short.removeprefix('rwkv.')}"
    return f"{prefix}{layer}.self_attn.{tail}"


def sound(
    version: int = 2,
    layers: Sequence[int] = (0,),
    heads: Sequence[str] = ("q",),
    kind: int = TENSOR_BF16,
    couple_lambda: bool = True,
    optional: bool = False,
    head: bool = False,
) -> Sidecar:
    """A sound sidecar. `optional`: with all that may be absent. `head`: sound up to the manifest, which is empty."""
    shapes = {"mem_v": (1, H), "beta": (1, H), "beta_b": (1,)} | {f"rwkv.{x}": (1,) for x in VECTORS}
    shapes |= {f"rwkv.{x}.weight": (1, 1) for x in ("receptance", "key", "value", "output")}
    shapes |= {f"rwkv.{x}{i}": (1, 1) for x in "wag" for i in (1, 2)}
    shapes |= {f"delta_{head}": (WIDTH[head], 1) for head in ("qkvo" if optional else heads)}
    if not couple_lambda:
        shapes |= {"lambda": (1, H), "lambda_b": (1,)}
    if optional:
        shapes |= {"mem_q": (1, H), "mem_k": (1, H)}
    config: dict[str, Any] = {
        "rank": 1, "alpha": 2.0, "num_state_heads": 1, "rwkv_ms_num_states": 1, "rwkv_ms_chunk_size": 4,
        "rwkv_ms_erase_gate": 1.0, "couple_lambda": couple_lambda, "state_update_mode": "standard",
        "rankwise_gates": True, "target_layers": list(layers), "delta_heads": list(heads), "memory_backend": "rwkv_ms",
        "memory_readout_mode": "delta", "rwkv_ms_boundary_mode": "fixed_chunk",
    }  # fmt: skip
    keys: list[tuple[str, int, Any]] = [
        ("schema", STRING, f"{SCHEMA}{version}"),
        ("format_version", U32, version),
        ("memory_backend", STRING, "rwkv_ms"),
        ("memory_readout_mode", STRING, "delta"),
        ("base_gguf_sha256", STRING, hashlib.sha256(b"base").hexdigest()),
        ("tensor_name_format", STRING, "compact_with_source_name_manifest"),
        ("rwkv_ms_boundary_mode", STRING, "fixed_chunk"),
    ]
    if version == 2:
        config["rwkv_ms_semantics_version"] = 2
        keys += [("rwkv_ms_semantics_version", U32, 2), ("rwkv_ms_state_dtype", STRING, "f32")]
    if optional:
        keys += [(name, STRING, f"of {name}") for name in PEOPLE]
    keys += [("tensor_count", U32, 0)]
    keys += [(x, U32, config[x]) for x in ("rank", "num_state_heads", "rwkv_ms_num_states", "rwkv_ms_chunk_size")]
    keys += [("total_numel", U64, 0), ("total_bytes", U64, 0), ("alpha", F32, config["alpha"])]
    keys += [("target_layers_json", STRING, list(layers)), ("delta_heads_json", STRING, list(heads))]
    keys += [("per_layer_attention_json", STRING, [attention_entry(layer, heads) for layer in layers])]
    keys += [("config_json", STRING, config), ("tensor_manifest_json", STRING, [])]
    sidecar = Sidecar([Key("general.architecture", STRING, "rwkv_ms_memory")])
    sidecar.keys += [Key(f"delta_mem.{name}", kind_, value) for name, kind_, value in keys]
    sidecar.tensors = [new_tensor(f"blk.{i}.{name}", shapes[name], kind) for i in layers for name in sorted(shapes)]
    if head:
        del sidecar.tensors[3:]
    sidecar.settle()
    if head:
        sidecar.manifest.clear()
    return sidecar


def attention_entry(layer: int, heads: Sequence[str], width: dict[str, int] = WIDTH) -> dict[str, Any]:
    """What per_layer_attention_json says of a layer; every sixth one has full attention."""
    kind = "full_attention" if layer % 6 == 5 else "sliding_attention"
    widths = {f"{head}_out": n for head, n in width.items()}
    return {"layer": layer, "attention_kind": kind, **widths, "active_delta_heads": list(heads)}


def _or(value: int | None, default: int) -> int:
    return default if value is None else value


def _bytes(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode()
