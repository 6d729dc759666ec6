"""Checkpoints are written without torch, as torch writes them, and nothing that is there is lost."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamamem.errors import LlamamemError
from llamamem.formats.checkpoint import read_checkpoint, read_safetensors, read_torch_zip
from llamamem.formats.checkpoint.writer import materialize, safetensors, torch_zip, write_checkpoint
from llamamem.formats.gguf_file import GgufTensor
from llamamem.formats.sidecar import read_sidecar

ODD = [
    GgufTensor("large", "F32", (70_000,), bytes(280_000)),
    GgufTensor("f\u00fcnf", "F16", (2, 3, 4, 5), np.arange(120).astype("<f2").tobytes()),
    GgufTensor("one", "BF16", (1, 1), b"\x80\x3f"),
]
FILES = {"delta_mem_adapter.pt", "delta_mem_config.json", "adapter_metadata.json"}


def test_the_pickle_is_byte_for_byte_that_of_torch(model_a: Path, tmp_path: Path) -> None:
    witness = model_a / "delta_mem_adapter.pt"  # torch.save wrote it
    (tmp_path / "x.pt").write_bytes(torch_zip(read_torch_zip(witness).values()))
    with zipfile.ZipFile(witness) as theirs, zipfile.ZipFile(tmp_path / "x.pt") as ours:
        for name in ours.namelist():
            assert ours.read(name) == theirs.read(name), name
        assert len([name for name in ours.namelist() if "/data/" in name]) == 186


def test_the_zip_is_stored_aligned_and_the_same_every_time() -> None:
    data = torch_zip(ODD)
    assert torch_zip(ODD) == data
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for info in archive.infolist():
            lengths = struct.unpack_from("<HH", data, info.header_offset + 26)
            assert info.compress_type == zipfile.ZIP_STORED and info.date_time == (1980, 1, 1, 0, 0, 0)
            assert (info.header_offset + 30 + sum(lengths)) % 64 == 0, info.filename


@pytest.mark.parametrize("tensors", [ODD, ODD[:1], []])
def test_other_shapes_and_types_are_read_again(tensors: list[GgufTensor], tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(torch_zip(tensors))
    assert list(read_torch_zip(tmp_path / "x.pt").values()) == tensors
    (tmp_path / "x.safetensors").write_bytes(safetensors(tensors))
    assert read_safetensors(tmp_path / "x.safetensors") == {t.name: t for t in tensors}


def write(folder: Path, **changes: Any) -> list[Path]:
    return write_checkpoint(folder, ODD, {"rank": 8, "alpha": 1.0}, {"base_model": "x"}, **changes)


def test_a_directory_is_made_and_its_config_keeps_its_order(tmp_path: Path) -> None:
    assert {path.name for path in write(tmp_path / "new")} == FILES
    read = read_checkpoint(tmp_path / "new")
    assert list(read.tensors.values()) == ODD and read.metadata == {"base_model": "x"}
    assert json.dumps(read.config) == '{"rank": 8, "alpha": 1.0}'


def test_what_is_there_is_kept(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(LlamamemError, match=r"is not empty; give another --output, or --force"):
        write(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt"}
    write(tmp_path, force=True)
    assert {path.name for path in tmp_path.iterdir()} == FILES | {"notes.txt"}
    assert (tmp_path / "notes.txt").read_text() == "mine"
    # a reader would take the old one
    with pytest.raises(LlamamemError, match=r"delta_mem_adapter\.pt: is there already"):
        write(tmp_path, force=True, format="safetensors")


def test_a_failure_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "old")
    before = {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()}
    written: list[Path] = []
    write_bytes = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        written.append(self)
        if len(written) % 3 == 0:
            raise OSError(28, "No space left on device")
        return write_bytes(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    for folder in ("old", "new"):
        with pytest.raises(LlamamemError, match="No space left on device"):
            write_checkpoint(tmp_path / folder, [], {}, {}, force=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()} == before
    assert not (tmp_path / "new").exists()


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(LlamamemError, match="is a file; give a directory as --output"):
        write(tmp_path / "file", force=True)
    with pytest.raises(LlamamemError, match="does not exist; create it first"):
        write(tmp_path / "no" / "where")


def test_materialize_by_the_command_line(llamamem: Callable[..., Any], exported: Path, tmp_path: Path) -> None:
    result = llamamem("sidecar", "materialize", exported, "--output", tmp_path / "out", "--format", "safetensors")
    assert result.status == 0 and result.out.splitlines()[0] == str(tmp_path / "out" / "delta_mem_adapter.safetensors")
    again = llamamem("sidecar", "materialize", exported, "--output", tmp_path / "out")
    assert again.status == 2 and again.out == "" and "--force" in again.err and again.err.count("\n") == 1


def test_metadata_that_is_no_object(exported: Path, tmp_path: Path) -> None:
    sidecar = read_sidecar(exported)
    key = "delta_mem.adapter_metadata_json"
    for text in ("[]", "{", '{"x": NaN}'):
        broken = replace(sidecar, fields=sidecar.fields | {key: replace(sidecar.fields[key], value=text)})
        with pytest.raises(LlamamemError, match=rf"'{key}' is no JSON object"):
            materialize(broken, tmp_path / "out")
    fields = {name: field for name, field in sidecar.fields.items() if name != key}
    materialize(replace(sidecar, fields=fields), tmp_path / "out")
    assert read_checkpoint(tmp_path / "out").metadata == {}
