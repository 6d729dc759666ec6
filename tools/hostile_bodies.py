"""Hostile requests, drawn: what stands in `rwkv_ms`, what a memory holds, which slot and which file an action names.

Each is bytes, as a client may send them: what no JSON writer would write is drawn too. Most are near something that is
right, because what is wrong everywhere is refused at the first look.
"""

from __future__ import annotations

import base64
import hashlib
import json
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from llamamem.formats.state.block import CHECKSUM, TRAILER, VERSION

GENERATE = {
    "/completion": {"prompt": "this is kate wolf.", "n_predict": 3},
    "/v1/completions": {"prompt": "who is kate?", "max_tokens": 3},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "who is kate?"}], "max_tokens": 3},
    "/v1/responses": {"input": "who is kate?", "max_output_tokens": 3},
    "/v1/messages": {"messages": [{"role": "user", "content": "who is kate?"}], "max_tokens": 3},
    "/infill": {"input_prefix": "this is", "input_suffix": "wolf.", "n_predict": 3},
}
OTHERS = ["/tokenize", "/apply-template", "/embeddings", "/v1/embeddings", "/rerank", "/v1/messages/count_tokens"]
ACTIONS = ["memory-save", "memory-restore", "memory-reset", "memory-set", "save", "restore", "erase", "memory-", ""]
FILES = ["good.bin", "pipe", "device", "directory", "sparse", "big", "link", "none.bin", "new.bin"]  # see `lay_out`
HEAD = 12 + 320  # bytes before the values of a memory alone

U32 = [0, 1, 2, 3, 4, 5, 7, 8, 255, 256, 319, 1 << 16, 1 << 24, (1 << 24) + 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1]
FLOATS = [float("nan"), float("inf"), float("-inf"), 3.4e38, -3.4e38, 1e30, 1e25, -1e19, 1e12, 1e-45, -0.0, 0.0, 16.0]
HUGE = [3.4e38, -3.4e38, 1e38, 1e30, 1e25, -1e25, 1e20, 1e19, -1e18, 1e12, 1e6]
SCALES = [0, 1, -1, 16, -16, 16.000001, -16.1, 17, 1e-45, 1e38, -3e38, 1e39, 1e308, -0.0, 1 << 63, 1 << 64, 10**40, 0.5]
NUMBERS: list[Any] = [
    -1,
    0,
    1,
    2,
    3,
    4,
    5,
    7,
    99,
    -2,
    1 << 31,
    -(1 << 31),
    1 << 32,
    (1 << 32) + 1,
    1 << 63,
    1 << 64,
    1.5,
]
NUMBERS += [-0.0, 1e300, 0.999]
ODD: list[Any] = [
    None,
    True,
    False,
    "",
    "0",
    "null",
    "a" * 5000,
    "\x00",
    "\ud800",
    "é\U0001f600",
    [],
    {},
    [[]],
    [0],
    {"a": 1},
]
RAW = [
    b"NaN",
    b"Infinity",
    b"-Infinity",
    b"1e999",
    b"-1e999",
    b"1e-999",
    b"01",
    b"+1",
    b".5",
    b"0x10",
    b"tru",
    b"'1'",
    b"",
]


class Request(NamedTuple):
    kind: str  # what is hostile about it
    method: str
    path: str
    body: bytes


class Raw(bytes):
    """Bytes to stand in a JSON text as they are."""


@dataclass(frozen=True)
class World:
    """What a client may know of the server: a memory that it gave, as a file, and how many slots it has."""

    memory: bytes
    n_slots: int


def draw(rng: random.Random, world: World) -> Request:
    return rng.choices(*zip(*KINDS, strict=True))[0](rng, world)  # type: ignore[no-any-return]


# -- JSON


def dump(value: Any) -> bytes:
    """JSON with `Raw` parts, and with pairs where a dict could not have a name twice."""
    if isinstance(value, Raw):
        return bytes(value)
    if isinstance(value, Pairs):
        return b"{" + b",".join(dump(name) + b":" + dump(item) for name, item in value) + b"}"
    if isinstance(value, dict):
        return b"{" + b",".join(dump(name) + b":" + dump(item) for name, item in value.items()) + b"}"
    if isinstance(value, list):
        return b"[" + b",".join(map(dump, value)) + b"]"
    return json.dumps(value).encode()


class Pairs(list[tuple[str, Any]]):
    pass


def nested(rng: random.Random, depth: int) -> Raw:
    left, right = rng.choice([(b"[", b"]"), (b'{"a":', b"}"), (b'[{"b":', b"}]")])
    return Raw(left * depth + b"1" + right * rng.choice([depth, depth, depth - 1, 0]))


def odd(rng: random.Random) -> Any:
    """A value of any type."""
    return rng.choice(
        [rng.choice(ODD), rng.choice(NUMBERS), Raw(rng.choice(RAW)), nested(rng, rng.choice([3, 100, 250]))]
    )


# -- a memory


def seal(data: bytes) -> bytes:
    """Right checksums over what was changed, as far as there is room for them."""
    block = bytearray(data[12 : -TRAILER.size])
    if len(block) >= 320:
        block[CHECKSUM] = bytes(32)
        block[CHECKSUM] = hashlib.sha256(block).digest()
    body = data[:12] + bytes(block)
    return body + TRAILER.pack(b"RMVE", VERSION, len(body), hashlib.sha256(body).digest())


def put(data: bytes, at: int, value: bytes) -> bytes:
    return data[:at] + value + data[at + len(value) :]


def memory(rng: random.Random, world: World) -> bytes:
    """The bytes of a file that is near a right one."""
    data = world.memory
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        data = rng.choice(EDITS)(rng, data)
    return seal(data) if rng.random() < 0.75 and len(data) > 12 + TRAILER.size else data


def _edit_header(rng: random.Random, data: bytes) -> bytes:
    return put(data, 12 + 4 * rng.randrange(14), struct.pack("<I", rng.choice(U32)))


def _edit_flags(rng: random.Random, data: bytes) -> bytes:
    """Flags, provenance or setting, identity."""
    note = rng.choice(
        [
            b"made by a test",
            b"\xff\xfe",
            b"\0\0x",
            b"\xed\xa0\x80",
            struct.pack("<fIQ", rng.choice(FLOATS), 1, 7),
            b"x" * 128,
        ]
    )
    data = put(data, 12 + 120, struct.pack("<I", rng.choice([0, 1, 2, 3, 4, 5, 7, 8, 1 << 31])))
    data = put(data, 12 + 192, note)
    if rng.random() < 0.3:
        at = 12 + rng.choice([56, 128, 160])
        data = put(data, at, rng.randbytes(32))
        if rng.random() < 0.5:  # an honest one of somebody else
            data = put(data, 12 + 56, hashlib.sha256(data[12 + 128 : 12 + 192]).digest())
    return data


def _edit_values(rng: random.Random, data: bytes) -> bytes:
    n = max(0, len(data) - HEAD - TRAILER.size) // 4
    value = rng.choice(FLOATS)
    if rng.random() < 0.2:
        return data[:HEAD] + struct.pack("<f", value) * n + data[HEAD + 4 * n :]
    return _filled(data, value) if rng.random() < 0.5 else _one_of(rng, data, value)


def _filled(data: bytes, value: float) -> bytes:
    """All values of all layers but the counters, the last two of each."""
    n = max(0, len(data) - HEAD - TRAILER.size) // 4
    width = int.from_bytes(data[12 + 44 : 12 + 48], "little")
    if not 2 < width <= n:
        return data
    layers = [data[at : at + 4 * width] for at in range(HEAD, HEAD + 4 * n, 4 * width)]
    filled = b"".join(struct.pack("<f", value) * (len(layer) // 4 - 2) + layer[-8:] for layer in layers)
    return data[:HEAD] + filled + data[HEAD + 4 * n :]


def _one_of(rng: random.Random, data: bytes, value: float) -> bytes:
    n = max(0, len(data) - HEAD - TRAILER.size) // 4
    for _ in range(rng.choice([1, 3]) if n else 0):
        data = put(data, HEAD + 4 * rng.randrange(n), struct.pack("<f", value))
    return data


def _edit_length(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    return rng.choice(
        [
            data[:at],
            data + rng.randbytes(rng.choice([1, 4, 48])),
            data[:at] + rng.randbytes(4) + data[at:],
            data * 2,
            data[at:],
        ]
    )


def _edit_bytes(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(rng.choice([16, HEAD, len(data) or 1])) if data else 0
    return put(data, at, bytes([rng.randrange(256)])) if at < len(data) else data


def _edit_tokens(rng: random.Random, data: bytes) -> bytes:
    n = rng.choice([1, 3, 100, 1 << 20, (1 << 32) - 1])
    return data[:8] + struct.pack("<I", n) + (rng.randbytes(4 * n) if n < 200 else b"") + data[12:]


EDITS: list[Callable[[random.Random, bytes], bytes]] = [
    *(_edit_header, _edit_flags, _edit_values, _edit_values, _edit_values, _edit_length, _edit_bytes, _edit_tokens),
]


def broken_base64(rng: random.Random, text: str) -> Any:
    """Base64 as somebody else may write it, or as it comes out of something that broke it."""
    at = rng.randrange(len(text) + 1)
    return rng.choice(
        [
            text[:at],
            text[:at] + rng.choice(["=", "\n", " ", "-", "_", "\x00", "é", "!", "====", "\\"]) + text[at:],
            text.rstrip("="),
            text + rng.choice(["=", "==", "A", "AAAA", "====", "\n"]),
            text.replace("+", "-").replace("/", "_"),
            "data:application/octet-stream;base64," + text,
            rng.choice(["", "=", "====", "A", "AA==", "A" * (1 << 20), "AAA=AAAA", "Zg==Zg=="]),
            [text],
            {"base64": text},
            Raw(b'"' + text.encode()[:at] + rng.choice([b"\xff", b"\xc0\x80", b"\\u0000", b"\\ud800", b"\\x"]) + b'"'),
        ]
    )


def memory_field(rng: random.Random, world: World) -> Any:
    text = base64.b64encode(memory(rng, world) if rng.random() < 0.7 else world.memory).decode()
    return broken_base64(rng, text) if rng.random() < 0.3 else text


# -- requests


def setting(rng: random.Random, world: World) -> Any:
    """The value of `rwkv_ms`: each field right, extreme or odd; others beside them."""
    if rng.random() < 0.08:
        return odd(rng)
    fields = Pairs()
    if rng.random() < 0.6:
        fields.append(("memory", memory_field(rng, world) if rng.random() < 0.85 else odd(rng)))
    if rng.random() < 0.4:
        fields.append(("scale", rng.choice(SCALES) if rng.random() < 0.8 else odd(rng)))
    if rng.random() < 0.3:
        fields.append(("frozen", rng.random() < 0.5 if rng.random() < 0.8 else odd(rng)))
    if rng.random() < 0.5:
        fields.append(("return_memory", rng.random() < 0.8 if rng.random() < 0.85 else odd(rng)))
    if rng.random() < 0.1:
        fields.append(
            (rng.choice(["session", "Memory", "memory ", "", "scale\x00", "__proto__", "a" * 2000]), odd(rng))
        )
    if fields and rng.random() < 0.08:  # twice, the same or another
        fields.append((fields[0][0], rng.choice([fields[0][1], odd(rng)])))
    return fields


def _route(rng: random.Random) -> str:
    return "/infill" if rng.random() < 0.03 else rng.choice([path for path in GENERATE if path != "/infill"])


def base_of(rng: random.Random, path: str) -> Pairs:
    body = Pairs(GENERATE[path].items())
    body.append(("temperature", 0))
    if rng.random() < 0.3:
        body.append(("stream", True if rng.random() < 0.8 else odd(rng)))
    if rng.random() < 0.35:
        slot = rng.randrange(-1, 4) if rng.random() < 0.5 else rng.choice([rng.choice(NUMBERS), odd(rng)])
        body.append(("id_slot", slot))
    if rng.random() < 0.2:
        body.append(
            (
                rng.choice(["n", "n_cmpl"]),
                rng.choice([1, 2, 3, 4]) if rng.random() < 0.6 else rng.choice([rng.choice(NUMBERS), odd(rng)]),
            )
        )
    if rng.random() < 0.15:
        body.append(("cache_prompt", rng.random() < 0.5 if rng.random() < 0.8 else odd(rng)))
    return body


def generating(rng: random.Random, world: World) -> Request:
    path = _route(rng)
    body = base_of(rng, path)
    body.append(("rwkv_ms", setting(rng, world)))
    if rng.random() < 0.04:
        body.append(("rwkv_ms", setting(rng, world)))
    return Request("rwkv_ms", "POST", path, dump(body))


def huge(rng: random.Random, world: World) -> Request:
    """A memory of huge or infinite values, all else as it should be: it gets as far as the model, if it may."""
    path = _route(rng)
    value = rng.choice(HUGE if rng.random() < 0.9 else FLOATS)
    data = seal(_filled(world.memory, value) if rng.random() < 0.6 else _one_of(rng, world.memory, value))
    fields = Pairs([("memory", base64.b64encode(data).decode()), ("return_memory", rng.random() < 0.7)])
    if rng.random() < 0.5:
        fields.append(("scale", rng.choice([16, -16, 0, 1, 0.5])))
    if rng.random() < 0.3:
        fields.append(("frozen", True))
    body = Pairs(GENERATE[path].items())
    body += [("temperature", 0), ("rwkv_ms", fields)]
    if rng.random() < 0.5:
        body.append(("id_slot", rng.randrange(world.n_slots)))
    return Request("huge values", "POST", path, dump(body))


def elsewhere(rng: random.Random, world: World) -> Request:
    """In a route that has no use for it."""
    body = Pairs([("content", "who is kate?"), ("input", "who is kate?"), ("query", "a"), ("documents", ["b"])])
    body += [("messages", [{"role": "user", "content": "a"}]), ("rwkv_ms", setting(rng, world))]
    return Request("another route", "POST", rng.choice(OTHERS), dump(body))


def deep(rng: random.Random, world: World) -> Request:
    depth = rng.choice([255, 256, 257, 300, 1000, 20_000, 400_000])
    what = nested(rng, depth)
    path = rng.choice([*GENERATE, *OTHERS, _slot_path(rng, world)])
    body = Pairs(GENERATE.get(path, {}).items())
    name = rng.choice(
        ["rwkv_ms", "scale", "memory", "id_slot", "prompt", "messages", "tools", "json_schema", "filename", "x"]
    )
    inner = what if name not in ("scale", "memory") else Pairs([(name, what)])
    body.append((name if inner is what else "rwkv_ms", inner))
    return Request("deep", "POST", path, rng.choice([dump(body), dump(body), bytes(what)]))


def no_json(rng: random.Random, world: World) -> Request:
    """A body that is cut, has bytes of its own, or is no object."""
    body = generating(rng, world).body
    at = rng.randrange(len(body) + 1)
    body = rng.choice(
        [
            body[:at],
            body[:at] + rng.choice([b"\x00", b"\xff", b"\xef\xbb\xbf", b'"', b"\\", b"]", b"//", b","]) + body[at:],
            b"\xef\xbb\xbf" + body,
            body.decode("latin-1").encode("utf-16"),
            body + body,
            dump(odd(rng)),
            b"",
            b" " * 100_000,
        ]
    )
    return Request("no JSON", "POST", rng.choice([*GENERATE, _slot_path(rng, world)]), body)


def _slot_path(rng: random.Random, world: World) -> str:
    slot = rng.choice(
        [*range(world.n_slots)] * 3
        + [-1, world.n_slots, 99, 1 << 31, 1 << 32, 1 << 64, "", "a", "1.5", "0x1", "%00", "0%20"]
    )
    action = rng.choice(
        ACTIONS if rng.random() < 0.9 else ["MEMORY-SAVE", "memory-save&action=erase", "a" * 3000, "%00"]
    )
    return f"/slots/{slot}?action={action}" if rng.random() < 0.97 else f"/slots/{slot}"


def slot_action(rng: random.Random, world: World) -> Request:
    body = Pairs()
    if rng.random() < 0.55:
        name: Any = rng.choice(FILES)
        if rng.random() < 0.3:
            name = rng.choice(
                ["../x", "/etc/passwd", "a" * 255, "a" * 5000, "", ".", "..", "a\x00b", "é.bin", "a/b", "C:x", odd(rng)]
            )
        body.append(("filename", name))
    if rng.random() < 0.35:
        body.append(("memory", memory_field(rng, world) if rng.random() < 0.85 else odd(rng)))
    if rng.random() < 0.3:
        body.append(("return_memory", True if rng.random() < 0.8 else odd(rng)))
    if rng.random() < 0.25:
        point = Pairs(
            [("origin", rng.choice([None, "a" * 64, "", odd(rng)])), ("n_text", rng.choice([*NUMBERS, odd(rng)]))]
        )
        point.append(("text", rng.choice([hashlib.sha256(b"").hexdigest(), "", odd(rng)])))
        body.append(("continues", point if rng.random() < 0.8 else odd(rng)))
    if rng.random() < 0.3:
        body.append(("scale", rng.choice(SCALES) if rng.random() < 0.8 else odd(rng)))
    if rng.random() < 0.3:
        body.append(("frozen", rng.random() < 0.5 if rng.random() < 0.8 else odd(rng)))
    if rng.random() < 0.15:
        body.append(("timeout", rng.choice([0, -1, 1, 1e9, 1e300, odd(rng)])))
    if rng.random() < 0.05:
        body.append((rng.choice(["x", "action", "id_slot"]), odd(rng)))
    return Request("slot action", "POST", _slot_path(rng, world), dump(body) if rng.random() < 0.97 else dump(odd(rng)))


def sound(rng: random.Random, world: World) -> Request:
    """Nothing is wrong with it: what is refused all the time proves little of what is taken."""
    path = _route(rng)
    fields = Pairs(
        [
            ("return_memory", rng.random() < 0.7),
            ("scale", rng.choice([1, 0, 16, -16, 2.5])),
            ("frozen", rng.random() < 0.2),
        ]
    )
    if rng.random() < 0.6:
        fields.append(("memory", base64.b64encode(world.memory).decode()))
    body = Pairs(GENERATE[path].items())
    body += [
        ("temperature", 0),
        ("rwkv_ms", fields),
        ("stream", rng.random() < 0.4),
        ("id_slot", rng.randrange(-1, world.n_slots)),
    ]
    return Request("sound", "POST", path, dump(body))


KINDS: list[tuple[Callable[[random.Random, World], Request], int]] = [
    *((generating, 35), (huge, 10), (slot_action, 25), (no_json, 8), (deep, 7), (elsewhere, 5), (sound, 10)),
]
