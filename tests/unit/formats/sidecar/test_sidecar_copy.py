"""Copies of a sidecar: `llamamem sidecar zero` and `rebind` change what they say, and no other byte."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from sidecar_edits import requantised

from llamamem.errors import LlamamemError
from llamamem.formats.gguf_file import read_gguf_index
from llamamem.formats.sidecar import read_sidecar
from llamamem.formats.sidecar.copy import rebind_sidecar, zero_sidecar

BASE = "model-f32.gguf"


def test_zero_changes_the_deltas_alone(llamamem: Callable[..., Any], exported: Path, tmp_path: Path) -> None:
    assert llamamem("sidecar", "zero", exported, "--output", tmp_path / "z.gguf").status == 0
    before, after = read_sidecar(exported), read_sidecar(tmp_path / "z.gguf")
    changed = {name for name in before.tensors if before.tensors[name] != after.tensors[name]}
    assert changed == {f"blk.{layer}.delta_{head}" for layer in range(6) for head in "qkvo"}
    assert not any(after.weights(layer)[f"delta_{head}"].any() for layer in range(6) for head in "qkvo")
    assert {k for k in before.fields if before.fields[k] != after.fields[k]} == {"delta_mem.tensor_manifest_json"}
    assert after.base_sha256 == before.base_sha256


def test_files_that_are_no_sidecar(llamamem: Callable[..., Any], model_a: Path, tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("hello")
    for path, says in (
        (model_a / BASE, "is it the base model?"),
        (tmp_path / "text.gguf", "[not-gguf]"),
        (tmp_path / "nowhere.gguf", "[unreadable]"),
        (tmp_path, "[unreadable]"),
    ):
        result = llamamem("sidecar", "zero", path, "--output", tmp_path / "out.gguf")
        assert result.status == 2 and says in result.err and str(path) in result.err
        assert result.err.count("\n") == 1


def test_zero_leaves_its_input_alone(exported: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(exported, tmp_path / "a.gguf"))
    with pytest.raises(LlamamemError, match="is the input itself"):
        zero_sidecar(path, path)
    assert path.read_bytes() == exported.read_bytes()


def test_rebind_changes_the_base_alone(
    llamamem: Callable[..., Any], exported: Path, model_a: Path, tmp_path: Path
) -> None:
    base = requantised(model_a, tmp_path / "a-much-longer-name-than-before.f16.gguf", name="tiny-random-gemma4-a")
    result = llamamem("sidecar", "rebind", exported, "--base", base, "--output", tmp_path / "b.gguf")
    assert result.status == 0 and result.out == ""
    assert "not proven" in result.err and "llamamem smoke" in result.err and "warning" not in result.err
    before, after = read_sidecar(exported), read_sidecar(tmp_path / "b.gguf")
    assert after.base_sha256 == hashlib.sha256(base.read_bytes()).hexdigest()
    assert after.fields["delta_mem.base_gguf"].value == base.name
    changed = {"delta_mem.base_gguf", "delta_mem.base_gguf_sha256"}
    assert {key for key in before.fields if before.fields[key] != after.fields[key]} == changed
    assert list(after.fields) == list(before.fields) and after.tensors == before.tensors
    # bound to the old base again it is the old file
    rebind_sidecar(tmp_path / "b.gguf", model_a / BASE, tmp_path / "c.gguf")
    assert (tmp_path / "c.gguf").read_bytes() == exported.read_bytes()


def test_rebind_keeps_keys_that_no_writer_of_ours_knows(exported: Path, model_a: Path, tmp_path: Path) -> None:
    data = exported.read_bytes()
    key = b"general.tags"
    tags = len(key).to_bytes(8, "little") + key + bytes([9, 0, 0, 0, 8, 0, 0, 0, 2]) + bytes(7)  # an array of 2 strings
    tags += (3).to_bytes(8, "little") + b"one" + (0).to_bytes(8, "little")
    at = data.index(b"delta_mem.schema") - 8
    start = read_gguf_index(exported).data_start
    last = gguf.GGUFReader(exported).tensors[-1].field
    end = int(last.offset) + sum(int(part.nbytes) for part in last.parts)
    header = bytearray(data[:at] + tags + data[at:end])
    header[16:24] = (int.from_bytes(header[16:24], "little") + 1).to_bytes(8, "little")
    header += bytes(-len(header) % 32)
    (tmp_path / "tagged.gguf").write_bytes(bytes(header) + data[start:])
    base = requantised(model_a, tmp_path / "new.gguf")
    rebind_sidecar(tmp_path / "tagged.gguf", base, tmp_path / "b.gguf")
    assert tags in (tmp_path / "b.gguf").read_bytes()
    rebind_sidecar(tmp_path / "b.gguf", model_a / BASE, tmp_path / "c.gguf")
    assert (tmp_path / "c.gguf").read_bytes() == (tmp_path / "tagged.gguf").read_bytes()


def test_rebind_to_another_model(
    llamamem: Callable[..., Any], exported: Path, model_a: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llamamem.formats.sidecar.copy.base_sha256", lambda *_: pytest.fail("the base was hashed"))

    def rebind(**changes: Any) -> str:
        base = requantised(model_a, tmp_path / "new.gguf", **changes)
        result = llamamem("sidecar", "rebind", exported, "--base", base, "--output", tmp_path / "b.gguf")
        assert result.status == 2 and result.err.count("\n") == 1 and not (tmp_path / "b.gguf").exists()
        return str(result.err)

    pattern = read_gguf_index(model_a / BASE).get("gemma4.attention.sliding_window_pattern")
    widths = {}
    for i in range(12):
        for name, shape in (("q", (128, 64)), ("k", (64, 64)), ("v", (64, 64)), ("output", (64, 128))):
            widths[f"blk.{i}.attn_{name}.weight"] = shape
    said = rebind(sliding_window_pattern=[False] * 12, shapes=widths)
    assert "[base-shape]" in said and "new.gguf" in said and str(exported) in said
    for layer in range(5):  # all of them at once
        assert f"layer {layer} is full_attention" in said and f"layer {layer}: q_out is 128" in said
    said = rebind(block_count=4, sliding_window_pattern=pattern[:4], shared_kv_layers=0)
    assert "has 4 layers, but layer 4 is a target" in said and "layer 5 is a target" in said


def test_rebind_warns_of_another_name(
    llamamem: Callable[..., Any], exported: Path, model_a: Path, tmp_path: Path
) -> None:
    base = requantised(model_a, tmp_path / "new.gguf", name="Another Model")
    result = llamamem("sidecar", "rebind", exported, "--base", base, "--output", tmp_path / "b.gguf")
    assert result.status == 0 and "warning: " in result.err and "Another Model" in result.err
    assert "tiny-random-gemma4-a" in result.err


def test_rebind_overwrites_sidecars_alone(exported: Path, model_a: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(exported, tmp_path / "a.gguf"))
    base = Path(shutil.copy(model_a / BASE, tmp_path / "base.gguf"))
    for output in (path, base):
        with pytest.raises(LlamamemError, match="is the input itself"):
            rebind_sidecar(path, base, output)
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(LlamamemError, match="is not a sidecar"):
        rebind_sidecar(path, base, tmp_path / "notes")
    zero_sidecar(path, tmp_path / "b.gguf")
    rebind_sidecar(path, base, tmp_path / "b.gguf")  # replaced
    assert read_sidecar(tmp_path / "b.gguf").tensors == read_sidecar(path).tensors
