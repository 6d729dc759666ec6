"""Files that are refused for their bytes, whatever they say: small ones byte by byte, a real one damaged."""

from __future__ import annotations

import os
import stat
import struct
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamamem.errors import LlamamemError
from llamamem.formats.base import file_sha256, read_base
from llamamem.formats.gguf_file import replacing
from llamamem.formats.sidecar import REASONS, read_sidecar, validate_sidecar

U8, U32, F32, STRING, ARRAY, U64 = 0, 4, 6, 8, 9, 10  # types of values
TENSOR_F32, TENSOR_Q8_0 = 0, 8


def u32(n: int) -> bytes:
    return struct.pack("<I", n)


def u64(*n: int) -> bytes:
    return struct.pack(f"<{len(n)}Q", *n)


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return u64(len(data)) + data


def field(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + u32(kind) + value


def array(item: int, n: int, items: bytes = b"") -> bytes:
    return u32(item) + u64(n) + items


def tensor(name: str | bytes, *ne: int, kind: int = TENSOR_F32, offset: int = 0) -> bytes:
    return text(name) + u32(len(ne)) + u64(*ne) + u32(kind) + u64(offset)


ARCH = field("general.architecture", STRING, text("rwkv_ms_memory"))


def header(n_tensors: int, n_keys: int, *parts: bytes) -> bytes:
    return b"GGUF" + u32(3) + u64(n_tensors, n_keys) + b"".join(parts)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 32)


TWO = padded(header(2, 1, ARCH, tensor("a", 4), tensor("b", 2, 2, offset=32)))  # 16 bytes each

FILES = {
    "empty": (b"", "not-gguf", ""),
    "short magic": (b"GGU", "not-gguf", "GGU"),
    "other magic": (b"PK\3\4" + bytes(40), "not-gguf", ""),
    "magic alone": (b"GGUF", "truncated", "header"),
    "version 2": (b"GGUF" + u32(2) + bytes(16), "gguf-version", "2"),
    "big-endian": (b"GGUF\0\0\0\3" + bytes(16), "gguf-version", ""),
    "cut counts": (b"GGUF" + u32(3) + u64(1 << 60), "truncated", "header"),
    "many tensors": (header(65537, 0), "gguf-count", "65537"),
    "many keys": (header(0, 1 << 63), "gguf-count", ""),
    "no keys": (header(0, 1), "truncated", "key 1"),
    "cut key": (header(0, 2, ARCH, u64(10), b"short"), "truncated", "key 2"),
    "long key": (header(0, 1, u64((1 << 64) - 1)), "truncated", "key 1"),
    "key not UTF-8": (header(0, 1, field(b"\xff", U8, b"0")), "not-utf8", "key 1"),
    "key with a surrogate": (header(0, 1, field(b"\xed\xa0\x80", U8, b"0")), "not-utf8", "key 1"),
    "key twice": (header(0, 2, ARCH, text("general.architecture")), "key-duplicate", "general.architecture"),
    "cut type": (header(0, 1, text("k"), b"\0"), "truncated", "'k'"),
    "unknown type": (header(0, 1, field("k", 13, b"")), "gguf-type", "'k'"),
    "array of arrays": (header(0, 1, field("k", ARRAY, u32(ARRAY))), "gguf-type", "'k'"),
    "unknown item": (header(0, 1, field("k", ARRAY, u32(99))), "gguf-type", "'k'"),
    "cut value": (header(0, 1, field("k", U64, u32(1))), "truncated", "'k'"),
    "long string": (header(0, 1, field("k", STRING, u64(1 << 62))), "truncated", "'k'"),
    "string not UTF-8": (header(0, 1, field("k", STRING, text(b"ab\xc3"))), "not-utf8", "'k'"),
    "long array": (header(0, 1, field("k", ARRAY, array(U64, 1 << 61))), "truncated", "'k'"),
    "array that overflows": (header(0, 1, field("k", ARRAY, array(U64, (1 << 61) + 1, bytes(8)))), "truncated", "'k'"),
    "long array of strings": (header(0, 1, field("k", ARRAY, array(STRING, 1 << 60, u64(0)))), "truncated", "'k'"),
    "item not UTF-8": (header(0, 1, field("k", ARRAY, array(STRING, 1, text(b"\xff")))), "not-utf8", "'k'"),
    "no architecture": (header(0, 0), "not-a-sidecar", "general.architecture"),
    "architecture is no string": (header(0, 1, field("general.architecture", U32, u32(1))), "not-a-sidecar", ""),
    "a model": (header(0, 1, field("general.architecture", STRING, text("gemma4"))), "not-a-sidecar", "'gemma4'"),
    "alignment": (header(0, 2, ARCH, field("general.alignment", U32, u32(64))), "alignment", "general.alignment"),
    "alignment of u64": (header(0, 2, ARCH, field("general.alignment", U64, u64(32))), "alignment", ""),
    "no tensors": (header(1, 1, ARCH), "truncated", "tensor 1"),
    "tensor not UTF-8": (header(1, 1, ARCH, tensor(b"\x80", 1)), "not-utf8", "tensor 1"),
    "tensor without a name": (header(1, 1, ARCH, tensor("", 1)), "tensor-name", "tensor 1"),
    "name of 64 bytes": (header(1, 1, ARCH, tensor("x" * 64, 1)), "tensor-name", "x" * 64),
    "name of 64 bytes in UTF-8": (header(1, 1, ARCH, tensor("ä" * 32, 1)), "tensor-name", ""),
    "tensor twice": (header(2, 1, ARCH, tensor("a", 4), text("a")), "tensor-duplicate", "'a'"),
    "no dimensions": (header(1, 1, ARCH, tensor("a")), "tensor-dims", "'a'"),
    "five dimensions": (header(1, 1, ARCH, text("a"), u32(5)), "tensor-dims", "'a'"),
    "dimension of 0": (header(1, 1, ARCH, tensor("a", 4, 0)), "tensor-dims", "'a'"),
    "2^49 values": (header(1, 1, ARCH, tensor("a", 1 << 49)), "tensor-dims", "'a'"),
    "2^64 values": (header(1, 1, ARCH, tensor("a", 1 << 32, 1 << 32)), "tensor-dims", "'a'"),
    "cut dimensions": (header(1, 1, ARCH, text("a"), u32(2), u64(4)), "truncated", "'a'"),
    "quantised": (header(1, 1, ARCH, tensor("a", 32, kind=TENSOR_Q8_0)), "tensor-type", "'a'"),
    "unknown tensor type": (header(1, 1, ARCH, text("a"), u32(1), u64(4), u32(1000)), "tensor-type", "'a'"),
    "first offset": (header(1, 1, ARCH, tensor("a", 4, offset=32)), "tensor-offset", "'a'"),
    "overlapping": (header(2, 1, ARCH, tensor("a", 4), tensor("b", 4, offset=0)), "tensor-offset", "'b'"),
    "gap": (header(2, 1, ARCH, tensor("a", 4), tensor("b", 4, offset=64)), "tensor-offset", "'b'"),
    "no data": (header(1, 1, ARCH, tensor("a", 4)), "truncated", "'a'"),
    "2^48 values": (header(1, 1, ARCH, tensor("a", 1 << 48)), "truncated", "'a'"),
    "cut data": (TWO + bytes(32 + 15), "truncated", "'b'"),
    "whole, without the last padding": (TWO + bytes(32 + 16), "key-missing", "delta_mem.format_version"),
    "whole": (TWO + bytes(32 + 32), "key-missing", "delta_mem.format_version"),
    "a byte more": (TWO + bytes(32 + 33), "trailing-bytes", "1 bytes"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_refused(name: str, tmp_path: Path) -> None:
    data, reason, named = FILES[name]
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(LlamamemError) as caught:
        read_sidecar(path)
    assert caught.value.reason == reason and str(caught.value).startswith(f"{path}: [{reason}] ")
    assert named in str(caught.value)
    assert [finding.reason for finding in validate_sidecar(path).findings][:1] == [reason]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "large.gguf").touch()
    os.truncate(tmp_path / "large.gguf", (1 << 30) + 1)  # a hole, no disk is used
    for name, reason in (("nowhere.gguf", "unreadable"), (".", "unreadable"), ("large.gguf", "too-large")):
        with pytest.raises(LlamamemError) as caught:
            read_sidecar(tmp_path / name)
        assert caught.value.reason == reason
        (found,) = validate_sidecar(tmp_path / name).findings
        assert found.reason == reason and str(tmp_path) not in found.message


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    assert [finding.reason for finding in validate_sidecar(tmp_path / "pipe.gguf").findings] == ["unreadable"]
    for use in (read_sidecar, read_base, file_sha256):
        with pytest.raises(LlamamemError, match=r"pipe\.gguf.*not a regular file"):
            use(tmp_path / "pipe.gguf")


def test_a_file_is_on_the_disk_before_its_name_and_then_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, rename = os.fsync, Path.replace

    def logged_fsync(fd: int) -> None:
        done.append("folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file")
        fsync(fd)

    def logged_rename(self: Path, target: Path) -> Path:
        done.append("name")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(Path, "replace", logged_rename)
    with replacing(tmp_path / "x") as part:
        part.write_bytes(b"x")
    assert done == ["file", "name", "folder"]


def test_hostile_counts_take_no_time(tmp_path: Path) -> None:
    twice = "{" + ",".join(f'"k{i // 2}":0' for i in range(400_000)) + "}"
    names = "[" + ",".join(f'{{"name":"{i}"}}' for i in range(300_000)) + "]"
    keys = [
        field("general.tags", ARRAY, array(STRING, 100_000, u64(0) * 100_000)),
        field("delta_mem.format_version", U32, u32(2)),
        field("delta_mem.config_json", STRING, text(twice)),
        field("delta_mem.per_layer_attention_json", STRING, text("[" * 1_000_000)),
        field("delta_mem.tensor_manifest_json", STRING, text(names)),
    ]
    path = tmp_path / "bad.gguf"
    path.write_bytes(header(0, 1 + len(keys), ARCH, *keys))
    start = time.monotonic()
    found = [finding.reason for finding in validate_sidecar(path).findings]
    assert time.monotonic() - start < 20  # quadratic would be minutes
    assert {"json-duplicate", "json-depth", "manifest"} <= set(found) and len(found) == 1000


def test_cut_files_are_refused(exported: Path, tmp_path: Path) -> None:
    data = exported.read_bytes()
    path = tmp_path / "cut.gguf"
    for size in [4, 8, 23, 24, 100, *range(1000, len(data), 997), len(data) - 32]:
        path.write_bytes(data[:size])
        with pytest.raises(LlamamemError, match=r"cut\.gguf: \[truncated\]"):
            read_sidecar(path)


@settings(deadline=None, max_examples=300)
@given(at=st.integers(0, 60_000), byte=st.integers(0, 255))
def test_a_damaged_header_is_one_clear_error(at: int, byte: int, exported: Path) -> None:
    data = bytearray(exported.read_bytes())
    path = exported.with_name("damaged.gguf")
    data[at], before = byte, data[at]
    path.write_bytes(data)
    try:
        read_sidecar(path)
    except LlamamemError as e:
        assert str(path) in str(e) and "\n" not in str(e) and before != byte
        assert e.reason in REASONS and e.reason == validate_sidecar(path).findings[0].reason
