"""Faults of the tensors and of what the manifest says of them."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

from hostile.case import Case, Edit, case, part
from hostile.raw import TENSOR_BF16, TENSOR_F16, TENSOR_F32, Sidecar, Tensor, manifest_entry, new_tensor, sound

NAME = "blk.0.beta_b"  # the tensor whose entry is changed
MANIFEST = "tensor_manifest_json"
NOT_FINITE = {
    TENSOR_BF16: {"nan": 0x7FC0, "signalling-nan": 0x7F81, "negative-nan": 0xFFFF, "infinity": 0x7F80,
                  "minus-infinity": 0xFF80},
    TENSOR_F16: {"nan": 0x7E00, "signalling-nan": 0x7C01, "infinity": 0x7C00, "minus-infinity": 0xFC00},
    TENSOR_F32: {"nan": 0x7FC00000, "signalling-nan": 0x7F800001, "infinity": 0x7F800000, "minus-infinity": 0xFF800000},
}  # fmt: skip


def cases() -> Iterator[Case]:
    """All of them."""
    yield from _manifest()
    yield from _entries()
    yield from _names()
    yield from _shapes()
    yield from _values()


def _manifest() -> Iterator[Case]:
    def change(what: str, names: Any, why: str, edit: Edit) -> Case:
        return case(f"manifest-{what}", "manifest", names, why, edit)

    yield change("empty", "blk.0.beta", "no tensor has an entry", lambda sidecar: sidecar.manifest.clear())
    yield change("entry-missing", NAME, "a tensor without an entry", lambda sidecar: sidecar.manifest.pop(1))
    yield change(
        "entry-of-no-tensor",
        "blk.0.new",
        "an entry of no tensor of the file",
        lambda sidecar: sidecar.manifest.append(sidecar.manifest[1] | {"name": "blk.0.new"}),
    )
    yield change(
        "entry-twice", NAME, "two entries of a tensor", lambda sidecar: sidecar.manifest.append(sidecar.manifest[1])
    )
    yield change(
        "entry-for-another",
        "blk.0.beta",
        "the name of another tensor, which then has two",
        lambda sidecar: sidecar.manifest[1].update(name="blk.0.beta"),
    )
    yield change(
        "name-not-trimmed", MANIFEST, "of no tensor", lambda sidecar: sidecar.manifest[1].update(name=f"{NAME} ")
    )
    yield change(
        "name-with-nul", MANIFEST, "of no tensor", lambda sidecar: sidecar.manifest[1].update(name=f"{NAME}\0")
    )
    yield change("name-missing", MANIFEST, "no name", lambda sidecar: sidecar.manifest[1].pop("name"))
    for what, value in (("number", 1), ("null", None), ("list", [NAME])):
        yield change(
            f"name-{what}", MANIFEST, "no name", lambda sidecar, value=value: sidecar.manifest[1].update(name=value)
        )
    for what, value in (("null", None), ("string", NAME), ("number", 1), ("list", [])):
        yield change(
            f"entry-{what}", MANIFEST, "no object", lambda sidecar, value=value: sidecar.manifest.__setitem__(1, value)
        )


def _entries() -> Iterator[Case]:
    numbers = {"one-more": 3, "float": 2.0, "true": True, "string": "2", "negative": -2, "2p64-and-2": 2**64 + 2}
    numbers |= {"2p32-and-2": 2**32 + 2, "null": None, "list": [2]}
    source = manifest_entry(new_tensor(NAME, (1,)))["source_name"]
    for field, values in {
        "source_name": {
            "of-another": source.replace("beta_bias", "beta_proj"),
            "of-another-layer": source.replace("layers.0", "layers.1"),
            "zeros-before-layer": source.replace("layers.0", "layers.00"),
            "longer": source + ".",
            "with-nul": source + "\0",
            "short": NAME,
            "number": 1,
            "null": None,
        },
        "shape": {
            "2": [2], "0": [0], "float": [1.0], "true": [True], "string": "[1]", "of-list": [[1]], "negative": [-1],
            "2p64-and-1": [2**64 + 1], "trailing-1-and-2": [2, 1], "null": None, "empty-object": {},
        },
        "gguf_type": {"f16": "F16", "f32": "F32", "empty": "", "suffix": "BF16.", "longer": "BF162", "number": 30,
                      "null": None},
        "bytes": numbers,
    }.items():  # fmt: skip
        for what, value in values.items():
            yield _entry(field, what, value, "manifest")
    for what, value in numbers.items():
        # of a tensor with two values, so that only the type is wrong where it is
        yield _entry("numel", what, value, "manifest", "blk.0.beta")
    for field in ("source_name", "shape", "gguf_type", "numel", "bytes", "sha256_raw"):
        yield case(
            f"manifest-{field}-missing",
            "manifest",
            NAME,
            "it must be there",
            lambda sidecar, field=field: sidecar.manifest[1].pop(field),
        )
    yield case(
        "manifest-shape-transposed",
        "manifest",
        "blk.0.beta",
        "in the order of ggml",
        lambda sidecar: sidecar.manifest[0].update(shape=[2, 1]),
    )
    digest = manifest_entry(new_tensor(NAME, (1,)))["sha256_raw"]
    for what, value in {
        "upper-case": digest.upper(),
        "of-another": manifest_entry(new_tensor("blk.0.beta", (2,)))["sha256_raw"],
        "63-digits": digest[:-1],
        "newline": digest + "\n",
        "empty": "",
    }.items():
        yield _entry("sha256_raw", what, value, "tensor-hash")
    for what, value in (("number", 1), ("null", None), ("list", [digest])):
        yield _entry("sha256_raw", what, value, "manifest")


def _entry(field: str, what: str, value: Any, reason: str, name: str = NAME) -> Case:
    def edit(sidecar: Sidecar) -> None:
        next(entry for entry in sidecar.manifest if entry["name"] == name)[field] = value

    return case(f"manifest-{field}-{what}", reason, name, "not that of the tensor", edit)


def _names() -> Iterator[Case]:
    def extra(name: str | bytes) -> Edit:
        tensor = new_tensor("x", (1,))
        return lambda sidecar: sidecar.tensors.append(Tensor(name, tensor.dims, tensor.type, tensor.data))

    for tensor in sound().tensors:
        name = str(tensor.name)
        yield case(
            f"tensor-missing-{name}",
            "tensor-missing",
            name,
            "not optional",
            lambda sidecar, name=name: sidecar.tensors.remove(sidecar.tensor(name)),
            settle=True,
        )
    for name in ("blk.0.lambda", "blk.0.lambda_b"):
        yield case(
            f"tensor-missing-{name}",
            "tensor-missing",
            name,
            "couple_lambda is false",
            lambda sidecar, name=name: sidecar.tensors.remove(sidecar.tensor(name)),
            settle=True,
            couple_lambda=False,
        )
    yield case(
        "tensor-missing-second-layer",
        "tensor-missing",
        "blk.5.rwkv.x_r",
        "each layer has its own",
        lambda sidecar: sidecar.tensors.remove(sidecar.tensor("blk.5.rwkv.x_r")),
        settle=True,
        layers=(0, 5),
    )
    yield case(
        "tensor-missing-delta-o",
        "tensor-missing",
        "blk.0.delta_o",
        "not optional where the head is active",
        lambda sidecar: sidecar.tensors.remove(sidecar.tensor("blk.0.delta_o")),
        settle=True,
        heads=("q", "o"),
    )
    yield case(
        "tensor-of-another-layer",
        "tensor-missing",
        "blk.0.rwkv.w0",
        "named as one of layer 1",
        part("blk.0.rwkv.w0", name="blk.1.rwkv.w0"),
        settle=True,
    )
    unknown = {
        "rwkv-new": "blk.0.rwkv.new", "layer-7": "blk.7.mem_v", "lambda": "blk.0.lambda",
        "sha1": "tensor.0123456789abcdef",
        "layer-00": "blk.00.mem_v", "layer-negative": "blk.-1.mem_v", "layer-4096": "blk.4096.mem_v",
        "no-layer": "mem_v", "suffix": "blk.0.mem_v.weight", "upper-case": "blk.0.MEM_V", "nul": "blk.0.mem_v\0",
        "source-name": "layers.0.self_attn.memory_v_proj", "63-bytes": "blk.0." + "x" * 57, "newline": "blk.0.\nmem_v",
        "terminal-escape": "blk.0.\x1b[2J", "layer-2p64": f"blk.{2**64}.mem_v", "empty-short": "blk.0.",
    }  # fmt: skip
    for what, name in unknown.items():
        shown = [name] if name.isprintable() else []
        yield case(
            f"tensor-unknown-{what}", "tensor-unknown", shown, "no layer has a place for it", extra(name), settle=True
        )

    def no_key_head(sidecar: Sidecar) -> None:
        sidecar.attention[0]["k_out"] = None

    yield case(
        "tensor-unknown-delta-of-no-projection",
        "tensor-unknown",
        "blk.0.delta_k",
        "the layer has no such projection",
        no_key_head,
        optional=True,
    )
    yield case(
        "tensor-unknown-without-entry",
        "tensor-unknown",
        "blk.0.new",
        "and no entry either",
        extra("blk.0.new"),
        _forget_last,
    )


def _forget_last(sidecar: Sidecar) -> None:
    sidecar.settle()
    sidecar.manifest.pop()


def _shapes() -> Iterator[Case]:
    for tensor in sound(optional=True, couple_lambda=False).tensors:
        name, shape = str(tensor.name), tensor.dims[::-1]
        optional = name.rpartition(".")[2] in ("delta_k", "delta_o", "delta_v", "mem_k", "mem_q")
        of = {"optional": optional, "couple_lambda": "lambda" not in name}
        yield _shape(f"one-row-more-{name}", name, (shape[0] + 1, *shape[1:]), **of)
        if len(shape) > 1 and shape[0] != shape[1] and name != "blk.0.mem_v":
            yield _shape(f"transposed-{name}", name, (shape[1], shape[0]), **of)
    yield _shape("column-more-blk.0.beta", "blk.0.beta", (1, 3))
    yield _shape("column-more-blk.0.delta_q", "blk.0.delta_q", (3, 2))
    yield _shape("three-dimensions", "blk.0.beta", (2, 1, 2))
    yield _shape("four-dimensions", "blk.0.beta", (2, 1, 1, 2))
    yield _shape("trailing-1", "blk.0.beta", (2, 1, 1))
    yield _shape("hidden-of-second-layer", "blk.5.mem_v", (1, 3), layers=(0, 5))
    yield _shape("lora-of-second-layer", "blk.5.rwkv.w1", (1, 2), layers=(0, 5))
    yield _shape("lora-of-first-layer", "blk.0.rwkv.w1", (1, 2), named="blk.0.rwkv.a1")
    yield case(
        "tensor-shape-not-rankwise",
        "tensor-shape",
        "blk.0.beta",
        "rankwise_gates is false, so that there is one gate a head",
        lambda sidecar: sidecar.config.update(rankwise_gates=False),
        part("blk.0.beta", dims=[2, 2], data=new_tensor("x", (2, 2)).data),
        settle=True,
    )


def _shape(what: str, name: str, shape: tuple[int, ...], named: str | None = None, **of: Any) -> Case:
    def edit(sidecar: Sidecar) -> None:
        new, tensor = new_tensor(name, shape), sidecar.tensor(name)
        tensor.dims, tensor.data = new.dims, new.data

    return case(f"tensor-shape-{what}", "tensor-shape", named or name, "not that of the table", edit, settle=True, **of)


def _values() -> Iterator[Case]:
    names = {TENSOR_BF16: "bf16", TENSOR_F16: "f16", TENSOR_F32: "f32"}
    for kind, patterns in NOT_FINITE.items():
        for what, bits in patterns.items():
            code = "<I" if kind == TENSOR_F32 else "<H"
            yield _value(f"{what}-{names[kind]}", NAME, 0, struct.pack(code, bits), kind=kind)
    nan = struct.pack("<H", 0x7FC0)
    yield _value("last-value", "blk.0.mem_v", 2, nan)
    yield _value("last-tensor", str(sound().tensors[-1].name), 0, nan)
    yield _value("not-applied", "blk.0.rwkv.ln_x.bias", 0, nan)
    yield _value("not-used", "blk.0.mem_k", 0, nan, optional=True)
    yield _value("inactive-head", "blk.0.delta_k", 0, nan, optional=True)
    for name, byte, bit in (("blk.0.beta", 0, 0), (NAME, 1, 7), (str(sound().tensors[-1].name), 0, 6)):
        yield case(
            f"tensor-hash-bit-of-{name}",
            "tensor-hash",
            name,
            "one bit is flipped",
            lambda sidecar, name=name, byte=byte, bit=bit: _flip(sidecar.tensor(name), byte, bit),
        )
    yield case(
        "tensor-hash-not-used",
        "tensor-hash",
        "blk.0.mem_q",
        "one bit is flipped in a tensor that is not used",
        lambda sidecar: _flip(sidecar.tensor("blk.0.mem_q"), 3, 0),
        optional=True,
    )
    yield case(
        "tensor-hash-before-values",
        "tensor-hash",
        NAME,
        "a NaN that the manifest does not have",
        part(NAME, data=nan),
    )
    yield case(
        "tensor-hash-swapped",
        "tensor-hash",
        "blk.0.rwkv.a0",
        "the data of two tensors of one shape in each other's place",
        lambda sidecar: _swap(sidecar.tensor("blk.0.rwkv.a0"), sidecar.tensor("blk.0.rwkv.w0")),
    )


def _value(what: str, name: str, at: int, value: bytes, **of: Any) -> Case:
    def edit(sidecar: Sidecar) -> None:
        tensor = sidecar.tensor(name)
        tensor.data = tensor.data[:at] + value + tensor.data[at + len(value) :]

    return case(f"tensor-nonfinite-{what}", "tensor-nonfinite", name, "with its right hash", edit, settle=True, **of)


def _flip(tensor: Tensor, byte: int, bit: int) -> None:
    data = bytearray(tensor.data)
    data[byte] ^= 1 << bit
    tensor.data = bytes(data)


def _swap(a: Tensor, b: Tensor) -> None:
    a.data, b.data = b.data, a.data
