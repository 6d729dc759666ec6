"""Seeded edits of sound sidecars through both readers: the same first reason, or none, for each.

The corpus of hostile files has the faults that were thought of; these are those that were not.
LLAMAMEM_AGREE_FILES=N tries so many.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

from hostile.raw import (
    ARRAY,
    PEOPLE,
    SCALARS,
    STRING,
    TENSOR_TYPES,
    Key,
    Sidecar,
    array,
    dumps,
    new_tensor,
    sound,
    string,
    values,
)
from hostile.raw_3 import sound_3

from llamamem.formats.findings import REASONS
from llamamem.formats.sidecar import validate_sidecar
from llamamem.native.runtime import loader_refusal

DATA = Path(__file__).parents[1] / "data" / "model_a"
FILES = int(os.environ.get("LLAMAMEM_AGREE_FILES", "2000"))

Run = Callable[..., Any]
Edit = Callable[[random.Random, Sidecar], Any]

NUMBERS = [0, 1, 2, 3, 4, 5, 7, 8, 31, 32, 33, 64, 255, 256, 4095, 4096, 65_536, 1 << 20, 1 << 24, (1 << 24) + 1]
NUMBERS += [(1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 48, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]
JSON: list[Any] = [
    None,
    True,
    False,
    "",
    "q",
    "o",
    "f32",
    "standard",
    [],
    {},
    [[]],
    ["q"],
    [0],
    {"layer": 0},
    1.0,
    -0.0,
]
JSON += [0.5, 2.0, -1, 1e-320, 1e39, 1e300, -(1 << 63), 1 << 64, 10**30, "\ud83d\ude00", "\x00", "\xe9", "\u2028"]
JSON += NUMBERS
SNIPPETS = [
    '"',
    "\\",
    "\\u0000",
    "\\ud800",
    "\\udc00\\ud800",
    "\\ud83d\\ude00",
    "\\x",
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    " ",
]
SNIPPETS += [
    "\t",
    "\n",
    "\x0b",
    "\x00",
    "\ufeff",
    "\xe9",
    "null",
    "NaN",
    "-Infinity",
    "1e999",
    "-0",
    "01",
    "1.",
    ".5",
    "+1",
]
SNIPPETS += ["1e5", "1E+2", "true", "True", "//", "/**/", "'", "9" * 25, "-" + "9" * 25, '"rank":1,', '"x":0,', "[" * 9]


def test_both_readers_give_the_same_first_reason(product: Run, tmp_path: Path) -> None:
    path, seen = tmp_path / "edited.gguf", Counter[str | None]()
    for seed in range(FILES):
        path.write_bytes(edited(random.Random(seed)))
        findings, refusal = validate_sidecar(path).findings, product(loader_refusal, path)
        first = findings[0].reason if findings else None
        runtime = None if refusal is None else refusal.removeprefix(f"sidecar '{path}': [").partition("]")[0]
        assert first == runtime, f"seed {seed}: {findings[:1]}, {refusal}"
        seen[first] += 1
    print(dict(seen))
    if FILES >= 2000:  # edits that are all refused at the first byte would prove nothing
        assert seen[None] > FILES // 50
        assert len(seen) > 30 and seen.keys() - {None} <= REASONS.keys()


def edited(rng: random.Random) -> bytes:
    """A file with a few edits: of its parts, of its bytes, or of both."""
    kind = rng.randrange(8)
    if kind == 0:  # of a real exporter
        return bytes_edited(rng, (DATA / rng.choice(["sidecar-v1.gguf", "sidecar-v2.gguf"])).read_bytes())
    make, options = rng.choice(SOUND)
    sidecar = make(**options)
    for _ in range(rng.choice([1, 1, 1, 2, 3]) if kind < 6 else 0):
        rng.choice(EDITS)(rng, sidecar)
    if kind == 1:
        settle(sidecar)
    if kind < 5:
        return sidecar.compose()
    return bytes_edited(rng, b"".join(fields_edited(rng, sidecar) if kind == 6 else [sidecar.compose()]))


def settle(sidecar: Sidecar) -> None:
    """Manifest and counts of the tensors as they are now, where there are such keys; whatever type they have now."""
    try:
        sidecar.settle()
    except (StopIteration, TypeError):  # a key is gone, or has another value
        pass
    for key in sidecar.keys:
        if key.type in SCALARS and isinstance(key.value, int):
            n = _size(key.type)
            key.value = (key.value % (1 << 8 * n)).to_bytes(n, "little")


def bytes_edited(rng: random.Random, data: bytes) -> bytes:
    """Bytes flipped, put in, left out or cut off, anywhere; more of them where the keys are."""
    for _ in range(rng.choice([1, 1, 2, 4])):
        data = data or b"G"
        at = rng.randrange(rng.choice([24, 400, 400, *[len(data)] * 5])) % len(data)
        match rng.randrange(6):
            case 0 | 1:
                data = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
            case 2:
                data = data[:at] + bytes([rng.choice([0, 1, 0x22, 0x5B, 0x7F, 0x80, 0xC0, 0xFF])]) + data[at + 1 :]
            case 3:
                data = data[:at] + rng.randbytes(rng.randrange(1, 9)) + data[at:]
            case 4:
                data = data[:at] + data[at + rng.randrange(1, 40) :]
            case 5:
                data = data[:at] or data[:1]
    return data


def fields_edited(rng: random.Random, sidecar: Sidecar) -> list[bytes]:
    """One field of the layout with another value of the same length."""
    fields = [piece.data for piece in sidecar.pieces()]
    at = rng.choice([i for i, data in enumerate(fields) if 0 < len(data) <= 8])
    n = len(fields[at])
    fields[at] = (rng.choice(NUMBERS) % (1 << 8 * n)).to_bytes(n, "little")
    return fields


def another_value(rng: random.Random, sidecar: Sidecar) -> None:
    key = rng.choice(sidecar.keys)
    if key.type in SCALARS and not isinstance(key.value, bytes):
        key.value = rng.choice(NUMBERS).to_bytes(8, "little")[: len(key.encoded())]
    else:
        key.value = rng.choice(
            [
                b"\x00",
                b"",
                b"\xff",
                b"f32",
                b"rwkv_ms",
                b"delta",
                b"delta_rule",
                b"norm",
                b"Q",
                b"[]",
                b"{}",
                b"[0]",
                b'["q"]',
            ]
        )
        key.value = string(key.value)


def another_type(rng: random.Random, sidecar: Sidecar) -> None:
    key = rng.choice(sidecar.keys)
    key.type = rng.choice([*SCALARS, STRING])
    key.value = string(b"1") if key.type == STRING else bytes([1, 0, 0, 0, 0, 0, 0, 0])[: _size(key.type)]


def array_key(rng: random.Random, sidecar: Sidecar) -> None:
    kind, n = rng.choice([*SCALARS, STRING]), rng.randrange(4)
    items = string(rng.choice([b"", b"abc", b"\xff"])) if kind == STRING else rng.randbytes(_size(kind))
    key = Key(_name(rng), ARRAY, array(kind, items * n, rng.choice([n, n, n, n + 1, 1 << 62])))
    sidecar.keys.insert(rng.randrange(len(sidecar.keys) + 1), key)


def more_keys(rng: random.Random, sidecar: Sidecar) -> None:
    key = rng.choice([Key(_name(rng), STRING, "text"), deepcopy(rng.choice(sidecar.keys))])
    sidecar.keys.insert(rng.randrange(len(sidecar.keys) + 1), key)


def fewer_keys(rng: random.Random, sidecar: Sidecar) -> None:
    del sidecar.keys[rng.randrange(len(sidecar.keys))]


def keys_in_another_order(rng: random.Random, sidecar: Sidecar) -> None:
    rng.shuffle(sidecar.keys)


def another_member(rng: random.Random, sidecar: Sidecar) -> None:
    """A value anywhere in a JSON text."""
    if key := _json_key(rng, sidecar):
        holder, at = key, None  # the text itself
        value = key.value
        while isinstance(value, (dict, list)) and value and rng.random() < 0.9:
            holder, at = value, rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
            value = holder[at]
        action = rng.randrange(5)
        if at is None:
            key.value = deepcopy(rng.choice(JSON[8:14]))
        elif action == 0:
            del holder[at]
        elif action == 1 and isinstance(holder, list):
            holder.insert(at, deepcopy(rng.choice([value, *JSON])))
        elif action == 1:
            holder[rng.choice(MEMBERS)] = deepcopy(rng.choice(JSON))
        else:
            holder[at] = deepcopy(rng.choice(JSON))


def another_text(rng: random.Random, sidecar: Sidecar) -> None:
    """Characters anywhere in a JSON text."""
    if key := _json_key(rng, sidecar):
        text = dumps(key.value)
        at, snippet = rng.randrange(len(text) + 1), rng.choice(SNIPPETS)
        key.value = text[:at] + snippet + text[at + rng.choice([0, 0, 1, len(snippet)]) :]


def size_in_both_places(rng: random.Random, sidecar: Sidecar) -> None:
    """A figure that the key and config_json agree on."""
    names = ["rank", "num_state_heads", "rwkv_ms_num_states", "rwkv_ms_chunk_size"]
    for key in sidecar.keys:
        if str(key.name).endswith(".config_json") and isinstance(key.value, dict):
            name = rng.choice(names)
            value = rng.choice([n for n in NUMBERS if n < 1 << 32])
            key.value[name] = value
            for other in sidecar.keys:
                if str(other.name).endswith(f".{name}") and other.type == 4:
                    other.value = value


def another_tensor(rng: random.Random, sidecar: Sidecar) -> None:
    """Another name, shape, type, place or value of a tensor."""
    if not sidecar.tensors:
        return
    tensor = rng.choice(sidecar.tensors)
    match rng.randrange(8):
        case 0:
            tensor.name = rng.choice([_name(rng), tensor.name, "blk.0.mem_q", "blk.00.mem_v", "blk.1.beta", "x" * 64])
        case 1:
            tensor.dims = rng.choice([[*tensor.dims, 1], [1, *tensor.dims], tensor.dims[::-1], tensor.dims[:1], [2, 2]])
            n = 1
            for dim in tensor.dims:
                n *= dim
            tensor.data = values(str(tensor.name), n, tensor.type) if tensor.type in TENSOR_TYPES else tensor.data
        case 2:
            tensor.dims = [rng.choice(NUMBERS) for _ in range(rng.randrange(6))]
        case 3:
            tensor.type = rng.choice([*TENSOR_TYPES, 2, 8, 24, 31, 39, 255])
        case 4:
            tensor.offset = rng.choice(NUMBERS)
        case 5:
            odd = [b"\x80\x7f", b"\xc0\x7f", b"\x80\xff", b"\x00\x7c", b"\x00\x80", b"\x00\x00"]
            at = rng.randrange(0, max(len(tensor.data), 2), 2)
            tensor.data = (tensor.data[:at] + rng.choice(odd) + tensor.data[at + 2 :])[: len(tensor.data)]
        case 6:
            tensor.data += rng.randbytes(rng.choice([1, 2, 32]))
        case 7:
            sidecar.tensors.remove(tensor)


def more_tensors(rng: random.Random, sidecar: Sidecar) -> None:
    shorts = ["mem_q", "delta_k", "delta_v", "lambda", "lambda_b", "bias", "rwkv.x_z", "delta_scale", "delta_o_norm"]
    tensor = new_tensor(f"blk.{rng.choice([0, 0, 1, 5, 4096])}.{rng.choice(shorts)}", (1, rng.choice([1, 2, 3])))
    sidecar.tensors.insert(rng.randrange(len(sidecar.tensors) + 1), tensor)


def tensors_in_another_order(rng: random.Random, sidecar: Sidecar) -> None:
    rng.shuffle(sidecar.tensors)


def another_end(rng: random.Random, sidecar: Sidecar) -> None:
    if rng.random() < 0.5:
        sidecar.cut = rng.choice([1, 16, 30, 31, 32, 33, 64])
    else:
        sidecar.tail = bytes(rng.choice([1, 31, 32, 33]))


MEMBERS = ["rank", "x", "", "layer", "online_gain", "normalize_qk", "\xe9", "memory_backend", "delta_o_rmsnorm"]
MEMBERS += ["delta_o_rmsnorm_eps", "trainable_delta_scale", "delta_scale_max", "memory_write_granularity"]
EDITS: list[Edit] = [another_value, another_type, array_key, more_keys, fewer_keys, keys_in_another_order]
EDITS += [another_member, another_member, another_member, another_text, another_text, size_in_both_places]
EDITS += [another_tensor, another_tensor, more_tensors, tensors_in_another_order, another_end]
SOUND: list[tuple[Callable[..., Sidecar], dict[str, Any]]] = [
    *(
        (sound, of)
        for of in ({}, {"version": 1}, {"optional": True}, {"couple_lambda": False}, {"kind": 0}, {"kind": 1})
    ),
    *((sound, of) for of in ({"layers": (4095,)}, {"layers": (0, 5), "heads": ("q", "o")}, {"heads": tuple("vokq")})),
    *((sound_3, of) for of in ({}, {"kind": "rwkv_ms"}, {"norm": True, "heads": ("q", "k")}, {"optional": True})),
    *((sound_3, of) for of in ({"scale": "head"}, {"o_norm": True, "heads": ("q", "o")}, {"couple_lambda": False})),
    *((sound_3, of) for of in ({"kind": "rwkv_ms", "norm": True}, {"layers": (0, 1)}, {"heads": ()})),
]


def _name(rng: random.Random) -> str | bytes:
    ours = [f"memory_adapter.{name}" for name in ("x", "rope_head_dim", "omitted_tensors_json", "kind")]
    ours += ["general.name", "general.alignment", "general.architecture", "delta_mem.x", "x", "", b"\xff", "delta_mem."]
    return rng.choice([*ours, *(f"delta_mem.{name}" for name in PEOPLE)])


def _json_key(rng: random.Random, sidecar: Sidecar) -> Key | None:
    """A key whose value is still what becomes JSON."""
    keys = [key for key in sidecar.keys if isinstance(key.value, (dict, list))]
    return rng.choice(keys) if keys else None


def _size(kind: int) -> int:
    return {"B": 1, "b": 1, "?": 1, "H": 2, "h": 2, "I": 4, "i": 4, "f": 4}.get(SCALARS[kind], 8)
