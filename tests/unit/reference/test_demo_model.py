"""The demo's files belong together: base and GGUF, adapter and sidecar, tokenizer and language."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest

from llamamem.errors import LlamamemError
from llamamem.formats.base import file_sha256
from llamamem.formats.checkpoint import read_checkpoint
from llamamem.formats.checkpoint.writer import checkpoint_tensors
from llamamem.formats.demo_files import DemoFiles, demo_files
from llamamem.formats.sidecar import read_sidecar
from llamamem.reference import demo_tokenizer
from llamamem.reference.gguf_base import convert_base


@pytest.fixture(scope="module")
def files() -> DemoFiles:
    return demo_files()


def test_they_are_small(files: DemoFiles) -> None:
    together = sum(path.stat().st_size for path in files.model.parent.rglob("*") if path.is_file())
    assert together < 6_000_000


def test_the_gguf_is_the_base(files: DemoFiles, tmp_path: Path) -> None:
    convert_base(files.base, tmp_path / "again.gguf", "llamamem-demo")
    shipped, again = (gguf.GGUFReader(path) for path in (files.model, tmp_path / "again.gguf"))
    assert [t.name for t in shipped.tensors] == [t.name for t in again.tensors]
    assert all(np.array_equal(x.data, y.data) for x, y in zip(shipped.tensors, again.tensors, strict=True))
    for key, field in again.fields.items():
        if not key.startswith("GGUF."):
            assert shipped.fields[key].contents() == field.contents(), key


def test_the_sidecar_is_the_adapter_and_bound_to_the_gguf(files: DemoFiles) -> None:
    sidecar, checkpoint = read_sidecar(files.sidecar), read_checkpoint(files.adapter)
    exported = checkpoint_tensors(sidecar)
    assert exported.keys() == checkpoint.tensors.keys()
    assert all(exported[name].data == tensor.data for name, tensor in checkpoint.tensors.items())
    assert sidecar.base_sha256 == file_sha256(files.model)
    assert [layer.layer for layer in sidecar.layers] == [0, 1, 2, 3, 4, 5]
    assert (sidecar.rank, sidecar.states, sidecar.chunk) == (8, 4, 1024)


def test_the_tokenizer_is_that_of_the_language(files: DemoFiles) -> None:
    written = json.loads((files.base / "tokenizer.json").read_text())
    assert written == demo_tokenizer.tokenizer_json(demo_tokenizer.vocabulary())
    config = json.loads((files.base / "tokenizer_config.json").read_text())
    assert config == demo_tokenizer.tokenizer_config()


def test_a_directory_without_them_is_refused_with_the_command_that_makes_them(tmp_path: Path) -> None:
    with pytest.raises(LlamamemError, match=r"make_demo_model\.py --output"):
        demo_files(tmp_path)
