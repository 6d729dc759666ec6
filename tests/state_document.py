"""A second reader of state files: struct, and the tables of docs/state-format.md, which say where everything stands."""

from __future__ import annotations

import hashlib
import re
import struct
from pathlib import Path
from typing import Any

DOCUMENT = Path(__file__).parents[1] / "docs/state-format.md"

Rows = list[list[str]]


def tables() -> dict[str, Rows]:
    """The rows of every table of the document, by the words at its head."""
    found: dict[str, Rows] = {}
    rows: Rows | None = None
    for line in DOCUMENT.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip().replace("\\*", "*") for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|"):
            rows = None
        elif rows is None:
            rows = found.setdefault(" | ".join(cells), [])
        elif set(cells[0]) != {"-"}:
            rows.append(cells)
    return {head: rows[1:] if rows and set("".join(rows[0])) <= set("- ") else rows for head, rows in found.items()}


def header_fields() -> list[tuple[int, str, str]]:
    """Offset, bytes and meaning of every row of the memory block."""
    return [(int(offset), size, what) for offset, size, what in tables()["offset | bytes | what"]]


def read_by_document(data: bytes) -> dict[str, Any]:
    """Every field of a state file by the first words that the document has for it; asserts every hash in it."""
    (head,) = (head for head in tables() if head.startswith("bytes | "))
    magic = data[:4][::-1].decode()
    (column,) = (i for i, words in enumerate(tables()[head][0]) if f"`{magic}`" in words)
    out: dict[str, Any] = {"magic": magic}
    at, n = 0, 0
    for size, *columns in tables()[head]:
        what = columns[column - 1] if columns[column - 1] != "the same" else columns[0]
        if what.startswith("memory block"):
            assert str(struct.unpack_from("<I", data, at + 12)[0]) in what
            at += _block(data, at, out)
        elif what.startswith("u32 length, then"):
            (length,) = struct.unpack_from("<I", data, at)
            out["architecture"] = data[at + 4 : at + 4 + length].decode()
            at += 4 + length
        elif what.startswith("KV cache"):
            at += out["bytes of the KV cache after the block"]
        elif size == "4 n":
            out["token ids"] = struct.unpack_from(f"<{n}i", data, at)
            at += 4 * n
        elif what == "`RMVE`":
            assert data[at : at + 4] == b"RMVE"
            end, at = at, at + 4
        elif what.startswith("u64 bytes of the file before"):
            assert struct.unpack_from("<Q", data, at)[0] == end
            at += 8
        elif what == "hash of those bytes":
            assert data[at : at + 32] == hashlib.sha256(data[:end]).digest()
            at += 32
        elif size == "4":
            (value,) = struct.unpack_from("<I", data, at)
            n = value if what.startswith("u32 n,") else n
            at += 4
    assert at == len(data), "the tables of the document do not add up to the file"
    return out


def _block(data: bytes, start: int, out: dict[str, Any]) -> int:
    """The block's fields go into `out`; its bytes."""
    *fields, cells_row = header_fields()
    for offset, size, what in fields:
        raw = data[start + offset : start + offset + int(size)]
        name = re.split(r"[:,;`]| of the sidecar| of the base", what.removeprefix("u32 ").removeprefix("u64 "))[
            0
        ].strip()
        if what.startswith("hash of the"):
            name = what
        out[name] = int.from_bytes(raw, "little") if what.startswith(("u32 ", "u64 ")) else raw
    sizes = {"N": out["N"], "M": out["M"], "R": out["R"], "C": out["C"]}
    values = out["f32 values of one layer of a cell"]
    size = eval(cells_row[1], {"cells": out["cells"], "layers": out["target layers"], "values": values})
    size *= 2 if out["flags"] & 2 else 1
    first = start + cells_row[0]
    block = bytearray(data[start : first + size])
    block[88:120] = bytes(32)
    assert out["checksum"] == hashlib.sha256(block).digest()
    assert out["fingerprint"] == hashlib.sha256(data[start + 128 : start + 192]).digest()

    parts = [eval(count, dict(sizes)) for count, _ in tables()["values | what"]]
    assert sum(parts) == values
    floats = struct.unpack_from(f"<{size // 4}f", data, first)
    layers = [floats[i : i + values] for i in range(0, len(floats), values)]
    ends = [sum(parts[: i + 1]) for i in range(len(parts))]
    out["layers"] = [
        {
            "S": {
                (n, m, i, j): layer[((n * out["M"] + m) * out["R"] + j) * out["R"] + i]
                for n in range(out["N"])
                for m in range(out["M"])
                for i in range(out["R"])
                for j in range(out["R"])
            },
            "prev": layer[ends[0] : ends[1]],
            "tokens": int(layer[ends[1]]) + int(layer[ends[2]]) * out["M"] * out["C"],
        }
        for layer in layers
    ]
    return cells_row[0] + size
