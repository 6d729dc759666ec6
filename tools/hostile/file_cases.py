"""Faults of the file itself: what ends the reading before any key is looked at."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import partial

from hostile.case import Case, add, drop, early, part, put
from hostile.raw import (
    ARRAY,
    BOOL,
    F64,
    I32,
    SCALARS,
    STRING,
    U8,
    U32,
    U64,
    Piece,
    Sidecar,
    array,
    sound,
    string,
    u64,
)

FIRST, SECOND, LAST = "blk.0.beta", "blk.0.beta_b", "blk.0.delta_q"
M64 = 2**64 - 1
NOT_UTF8 = {
    "overlong": b"\xc0\xaf",
    "overlong-3": b"\xe0\x80\xaf",
    "surrogate": b"\xed\xa0\x80",
    "beyond-unicode": b"\xf4\x90\x80\x80",
    "cut-sequence": b"\xe2\x82",
    "lone-continuation": b"\x80",
    "byte-ff": b"\xff",
}
TYPE_NAMES = ("u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "string", "array", "u64", "i64", "f64")


small = partial(sound, head=True)


def cases() -> Iterator[Case]:
    """All of them."""
    yield from _header()
    yield from _truncated()
    yield from _lengths()
    yield from _arrays()
    yield from _texts()
    yield from _general()
    yield from _tensors()
    yield from _tail()


def _header() -> Iterator[Case]:
    whole = small().compose()
    for n, what in enumerate(("empty", "one-byte", "magic-2-bytes", "magic-3-bytes")):
        yield Case(f"truncated-{what}", "not-gguf", [], "too short for the magic", whole[:n])
    for what, magic in (("ggux", b"GGUX"), ("lower-case", b"gguf"), ("reversed", b"FUGG"), ("ggml", b"lmgg")):
        yield early(f"magic-{what}", "not-gguf", [], "another magic", part(magic=magic))
    for version in (0, 1, 2, 4, 0x03000000, 2**32 - 1):
        yield early(f"gguf-version-{version}", "gguf-version", str(version), "not version 3", part(version=version))

    for count, value in (("2p16-and-1", 2**16 + 1), ("2p32", 2**32), ("2p63", 2**63), ("2p64-less-1", M64)):
        yield early(f"key-count-{count}", "gguf-count", str(value), "more keys than any has", part(n_keys=value))
        yield early(
            f"tensor-count-{count}", "gguf-count", str(value), "more tensors than any has", part(n_tensors=value)
        )
    n_keys, n_tensors = len(small().keys), len(small().tensors)
    # the first description is read as a key: n_dims 2 is u16, and what follows a length far beyond the end
    yield early("key-count-one-more", "truncated", "tensor", "a description is read as a key", part(n_keys=n_keys + 1))
    yield early(
        "key-count-one-less",
        "tensor-dims",
        "delta_mem.tensor_manifest_json",
        "a key is read as a tensor, its type (8) as the number of dimensions",
        part(n_keys=n_keys - 1),
    )
    yield early("key-count-0", "not-a-sidecar", "general.architecture", "keys are read as tensors", part(n_keys=0))
    for pad, reason in ((7, "truncated"), (8, "tensor-name")):
        yield early(
            f"tensor-count-one-more-pad-{pad}",
            reason,
            f"tensor {n_tensors + 1}",
            f"the {pad} bytes of padding, and data, are read as a description",
            part(n_tensors=n_tensors + 1),
            lambda sidecar, pad=pad: _pad_header(sidecar, pad),
        )
    yield early(
        "tensor-count-one-less", "trailing-bytes", [], "the last tensor has no place", part(n_tensors=n_tensors - 1)
    )
    yield early("tensor-count-0", "trailing-bytes", [], "no tensor has a place", part(n_tensors=0))


def _pad_header(sidecar: Sidecar, n: int) -> None:
    add("general.name", "")(sidecar)
    while len(next(piece.data for piece in sidecar.pieces() if piece.part == "padding")) != n:
        sidecar.key("general.name").value += "x"


def _truncated() -> Iterator[Case]:
    """Cut at the start of each field and within it, where that is not a sound file yet."""
    sidecar = small()
    whole, at, numbers = sidecar.compose(), 0, {"key": 0, "tensor": 0}
    for piece in sidecar.pieces():
        kind, owner, what, data = piece
        if what == "length":
            numbers[kind] += 1
        for cut in _cuts(piece):
            where = "-".join((kind, str(owner).removeprefix("delta_mem."), what)).removeprefix("file-")
            yield Case(
                f"truncated-{where}-{cut}",
                "truncated",
                _named(piece, numbers),
                f"ends {cut} bytes into the {what} of {kind} {owner}".replace("file file", "the file"),
                whole[: at + cut],
            )
        at += len(data)


def _cuts(piece: Piece) -> list[int]:
    kind, _, what, data = piece
    if what in ("magic", "padding", "tail"):
        return []
    if kind == "data":
        return sorted({0, len(data) // 2, len(data) - 1})
    return sorted({0, len(data) // 2}) if what in ("length", "value", "dims") else [0]


def _named(piece: Piece, numbers: dict[str, int]) -> list[str]:
    """A name that is cut itself cannot be told, its number can."""
    if piece.kind == "file":
        return []
    if piece.part in ("length", "name"):
        return [f"{piece.kind} {numbers[piece.kind]}"]
    return [piece.owner]


def _lengths() -> Iterator[Case]:
    """Lengths of strings that lie."""
    size = len(small().compose())
    for what, length in (("2p63", 2**63), ("2p64-less-1", M64), ("2p64-less-8", M64 - 7), ("of-the-file", size)):
        yield early(
            f"key-name-length-{what}",
            "truncated",
            "key 2",
            "longer than the file",
            lambda sidecar, length=length: setattr(sidecar.keys[1], "length", length),
        )
        yield early(
            f"string-length-{what}",
            "truncated",
            "delta_mem.schema",
            "longer than the file",
            put("schema", string("x", length)),
        )
        yield early(
            f"tensor-name-length-{what}", "truncated", "tensor 2", "longer than the file", part(SECOND, length=length)
        )
        yield early(
            f"array-string-length-{what}",
            "truncated",
            "general.tags",
            "longer than the file",
            add("general.tags", array(STRING, string("x") + string("y", length), 2), ARRAY),
        )
    for what, more, named in (("rest", 0, "tensor 1"), ("rest-and-1", 1, "delta_mem.tensor_manifest_json")):
        yield early(
            f"string-length-{what}",
            "truncated",
            named,
            f"to {more} bytes behind the end of the file",
            lambda sidecar, more=more: _swallow_rest(sidecar, more),
        )


def _swallow_rest(sidecar: Sidecar, more: int) -> None:
    """The last key's text goes on to the end of the file, and `more`."""
    text = sidecar.keys[-1].encoded()[8:]
    rest = sidecar.compose().rpartition(string(text))[2]
    sidecar.keys[-1].value = u64(len(text + rest) + more) + text


def _arrays() -> Iterator[Case]:
    """Arrays whose count lies; general.* keys are passed over, but not what they claim."""
    key = "general.tags"
    for item, code in (*SCALARS.items(), (STRING, "Q")):
        size = struct.calcsize(code)
        items = bytes(3 * size)
        counts = {"2p64-less-1": M64}
        if size > 1:
            counts["overflow-to-3"] = 2**64 // size + 3
        for what, count in counts.items():
            yield early(
                f"array-of-{TYPE_NAMES[item]}-count-{what}",
                "truncated",
                key,
                "more items than the file has bytes",
                add(key, array(item, items, count), ARRAY),
            )
    for name, item in (("of-arrays", ARRAY), ("type-13", 13), ("type-255", 255), ("type-2p32-less-1", 2**32 - 1)):
        yield early(
            f"array-item-{name}",
            "gguf-type",
            key,
            "no type of an item",
            add(key, array(item, array(U8, b"x", 1), 1), ARRAY),
        )
    for kind in (13, 255, 2**31, 2**32 - 1):
        yield early(f"value-type-{kind}", "gguf-type", "general.new", "an unknown type", add("general.new", b"", kind))
    yield early(
        "value-type-13-of-known-key", "gguf-type", "delta_mem.rank", "an unknown type", put("rank", b"\1\0\0\0", 13)
    )


def _texts() -> Iterator[Case]:
    for what, data in NOT_UTF8.items():
        yield early(f"not-utf8-key-{what}", "not-utf8", "key", "in the name of a key", add(b"general.x" + data, "x"))
        yield early(
            f"not-utf8-value-{what}",
            "not-utf8",
            "general.name",
            "in a string",
            add("general.name", string(b"x" + data)),
        )
        yield early(
            f"not-utf8-tensor-{what}",
            "not-utf8",
            "tensor",
            "in the name of a tensor",
            part(SECOND, name=b"blk." + data),
        )
        yield early(
            f"not-utf8-json-{what}",
            "not-utf8",
            "delta_mem.adapter_metadata_json",
            "in a string of JSON",
            add("delta_mem.adapter_metadata_json", string(b'{"x":"' + data + b'"}')),
        )
    yield early(
        "not-utf8-array-item",
        "not-utf8",
        "general.tags",
        "in an item of an array",
        add("general.tags", array(STRING, string("x") + string(b"\xff"), 2), ARRAY),
    )
    yield early(
        "not-utf8-before-its-length-is-checked",
        "not-utf8",
        "tensor",
        "in a name that is too long as well",
        part(SECOND, name=b"\xff" * 64),
    )
    for what, key in (("other", "general.name"), ("architecture", "general.architecture"), ("rank", "delta_mem.rank")):
        edits = [add("general.name", "x"), add(key, "rwkv_ms_memory")]
        yield early(f"key-duplicate-{what}", "key-duplicate", key, "a key stands twice", *edits)
    yield early(
        "key-duplicate-cut",
        "key-duplicate",
        "delta_mem.rank",
        "the second one has an unknown type as well",
        add("delta_mem.rank", b"", 13),
    )


def _general() -> Iterator[Case]:
    arch = "general.architecture"
    yield early("architecture-missing", "not-a-sidecar", arch, "no architecture", drop(arch))
    yield early("architecture-u32", "not-a-sidecar", arch, "no string", put(arch, 1, U32))
    yield early("architecture-array", "not-a-sidecar", arch, "no string", put(arch, array(U8, b"x", 1), ARRAY))
    for what, value in (
        ("gemma4", "gemma4"),
        ("empty", ""),
        ("upper-case", "RWKV_MS_MEMORY"),
        ("longer", "rwkv_ms_memory2"),
        ("nul", "rwkv_ms_memory\0"),
    ):
        yield early(f"architecture-{what}", "not-a-sidecar", arch, "another architecture", put(arch, value))
    yield early(
        "architecture-before-tensors",
        "not-a-sidecar",
        "gemma4",
        "a base model: its tensor types are not complained of",
        put(arch, "gemma4"),
        part(FIRST, type=8),
    )
    align = "general.alignment"
    for value in (64, 0, 1, 3, 33, 2**31):
        yield early(f"alignment-{value}", "alignment", align, "not 32", add(align, value, U32))
    for what, value, kind in (("u64", 32, U64), ("i32", 32, I32), ("string", "32", STRING), ("bool", True, BOOL)):
        yield early(f"alignment-{what}", "alignment", align, "no u32", add(align, value, kind))
    yield early("alignment-f64", "alignment", align, "no u32", add(align, 32.0, F64))
    yield early("alignment-array", "alignment", align, "no u32", add(align, array(U32, b"\x20\0\0\0", 1), ARRAY))


def _tensors() -> Iterator[Case]:
    for n in (0, 64, 65, 200):
        yield early(f"tensor-name-{n}-bytes", "tensor-name", "tensor 2", f"{n} bytes", part(SECOND, name="x" * n))
    yield early("tensor-duplicate", "tensor-duplicate", FIRST, "a tensor stands twice", part(SECOND, name=FIRST))
    yield early(
        "tensor-duplicate-last",
        "tensor-duplicate",
        FIRST,
        "the first and the last have one name",
        part(LAST, name=FIRST),
    )
    for n in (0, 5, 2**31, 2**32 - 1):
        yield early(f"tensor-n-dims-{n}", "tensor-dims", SECOND, "from 1 to 4", part(SECOND, n_dims=n))
    for what, dims in {
        "0": [0],
        "0-last": [1, 1, 1, 0],
        "2p48-and-1": [2**48 + 1],
        "2p63": [2**63],
        "2p64-less-1": [M64],
        "2p32-by-2p32": [2**32, 2**32],
        "2p63-by-2": [2**63, 2],
        "2p16-four-times": [2**16] * 4,
        "2p25-by-2p24": [2**25, 2**24],
        "overflow-to-1": [2**32 - 1, 2**32 + 1],  # 2^64 - 1 and so, as an i64, -1
        "overflow-to-2": [2**63 + 1, 2],
        "2p63-by-0": [2**63, 0],
    }.items():
        yield early(f"tensor-dims-{what}", "tensor-dims", SECOND, "no such number of values", part(SECOND, dims=dims))
    yield early(
        "tensor-dims-2p48-last", "truncated", LAST, "values far beyond the end of the file", part(LAST, dims=[2**48])
    )
    yield early(
        "tensor-dims-2p48-next",
        "tensor-offset",
        SECOND,
        "its end is where the next one should begin",
        part(FIRST, dims=[2**48]),
    )
    types = {"f64": 28, "i8": 24, "i16": 25, "i32": 26, "i64": 27, "q4-0": 2, "q8-0": 8, "q8-k": 15, "tq1-0": 34}
    types |= {"removed-4": 4, "removed-5": 5, "removed-31": 31, "removed-36": 36, "mxfp4": 39, "40": 40, "255": 255}
    types |= {"2p31": 2**31, "2p32-less-1": 2**32 - 1}
    for what, kind in types.items():
        yield early(f"tensor-type-{what}", "tensor-type", SECOND, "not BF16, F16, F32", part(SECOND, type=kind))
    for what, offset in {
        "overlap": 0,
        "gap": 64,
        "unaligned": 33,
        "one-less": 31,
        "2p40": 2**40,
        "2p63": 2**63,
        "2p64-less-32": M64 - 31,
        "2p64-less-1": M64,
    }.items():
        yield early(
            f"tensor-offset-{what}",
            "tensor-offset",
            SECOND,
            "not the end of the one before",
            part(SECOND, offset=offset),
        )
    yield early("tensor-offset-first", "tensor-offset", FIRST, "the first is at 0", part(FIRST, offset=32))
    yield early(
        "tensor-offset-swapped",
        "tensor-offset",
        FIRST,
        "two tensors in each other's place",
        part(FIRST, offset=32),
        part(SECOND, offset=0),
    )


def _tail() -> Iterator[Case]:
    yield early("trailing-1-byte", "trailing-bytes", [], "the file goes on", part(tail=b"\0"))
    yield early("trailing-32-bytes", "trailing-bytes", [], "the file goes on", part(tail=bytes(32)))
    yield early("trailing-file", "trailing-bytes", [], "another file follows", part(tail=small().compose()))
