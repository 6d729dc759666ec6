"""Checkpoint to sidecar to checkpoint: nothing changes on the way. Also at full size, in the shape of Gemma 4 E4B."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from llamamem.formats.base import read_base
from llamamem.formats.checkpoint import read_checkpoint
from llamamem.formats.checkpoint.writer import materialize
from llamamem.formats.sidecar import Sidecar, read_sidecar, validate_sidecar
from llamamem.formats.sidecar.compare import compare
from llamamem.formats.sidecar.export import export_sidecar

ROOT = Path(__file__).parents[4]
SHAPE = ROOT / "configs" / "gemma-4-e4b.json"


class E4B(NamedTuple):
    checkpoint: Path
    base: Path
    sidecar: Path
    published: dict[str, Any]


@pytest.fixture(scope="session")
def e4b(tmp_path_factory: pytest.TempPathFactory) -> E4B:
    """A random memory of the published shape. Not to be changed."""
    folder = tmp_path_factory.mktemp("e4b")
    made = E4B(folder / "memory", folder / "base.gguf", folder / "e4b.gguf", json.loads(SHAPE.read_text())["published"])
    tool = ROOT / "tools" / "make_checkpoint.py"
    subprocess.run([sys.executable, tool, SHAPE, "--output", made.checkpoint, "--base", made.base], check=True)
    export_sidecar(made.checkpoint, made.base, made.sidecar)
    return made


def there_and_back(sidecar: Sidecar, source: Path, config: str, folder: Path, format: str) -> None:
    materialize(sidecar, folder, format=format)
    before, after = read_checkpoint(source, config), read_checkpoint(folder)
    assert after.tensors == before.tensors and after.adapter.suffix == f".{format}"
    assert json.dumps(after.config) == json.dumps(before.config) and after.metadata == before.metadata
    second = folder.with_name("again")
    materialize(sidecar, second, format=format)
    for path in folder.iterdir():
        assert (second / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("format", ["pt", "safetensors"])
@pytest.mark.parametrize("config", ["delta_mem_config.json", "delta_mem_config_v2.json"])
def test_model_a(config: str, format: str, model_a: Path, tmp_path: Path) -> None:
    base = model_a / "model-f32.gguf"
    sidecar = export_sidecar(model_a, base, tmp_path / "a.gguf", config=config)
    there_and_back(sidecar, model_a, config, tmp_path / "back", format)
    assert (tmp_path / "back" / "delta_mem_config.json").read_bytes() == (model_a / config).read_bytes()
    export_sidecar(tmp_path / "back", base, tmp_path / "b.gguf")
    assert (tmp_path / "b.gguf").read_bytes() == (tmp_path / "a.gguf").read_bytes()
    assert compare(tmp_path / "back", tmp_path / "a.gguf").same


@pytest.mark.parametrize("format", ["pt", "safetensors"])
def test_e4b(format: str, e4b: E4B, tmp_path: Path) -> None:
    there_and_back(read_sidecar(e4b.sidecar), e4b.checkpoint, "delta_mem_config.json", tmp_path / "back", format)
    export_sidecar(tmp_path / "back", e4b.base, tmp_path / "b.gguf")
    assert (tmp_path / "b.gguf").read_bytes() == e4b.sidecar.read_bytes()


def test_the_published_delta_rule(tmp_path: Path) -> None:
    """The shape of delta-mem's adapter for Qwen3-4B: all layers, and zeros for the heads of k and v."""
    shape = ROOT / "configs" / "qwen3-4b.json"
    published, tool = json.loads(shape.read_text())["published"], ROOT / "tools" / "make_checkpoint.py"
    subprocess.run(
        [sys.executable, tool, shape, "--output", tmp_path / "4b", "--base", tmp_path / "b.gguf"], check=True
    )
    source = read_checkpoint(tmp_path / "4b")
    assert {path.name for path in (tmp_path / "4b").iterdir()} == {"delta_mem_adapter.pt", "delta_mem_config.json"}
    assert (len(source.tensors), sum(len(t.data) for t in source.tensors.values())) == (324, 2 * 5_456_160)
    assert (published["tensors"], published["numel"]) == (324, 5_456_160)
    assert abs(source.adapter.stat().st_size - published["adapter_bytes"]) < 50_000  # names and padding

    sidecar = export_sidecar(tmp_path / "4b", tmp_path / "b.gguf", tmp_path / "4b.gguf")
    assert [sidecar.get(key) for key in ("tensor_count", "total_numel")] == [252, 4_866_336]
    assert [published[key] for key in ("active_tensors", "active_numel")] == [252, 4_866_336]
    assert sidecar.tensors["blk.35.delta_q"].shape == (4096, 8)
    assert validate_sidecar(sidecar.path, tmp_path / "b.gguf").findings == ()
    there_and_back(sidecar, tmp_path / "4b", "delta_mem_config.json", tmp_path / "back", "pt")


def test_the_published_figures(e4b: E4B) -> None:
    sidecar, published = read_sidecar(e4b.sidecar), e4b.published
    assert (published["tensors"], published["numel"], published["tensor_bytes"]) == (186, 797_808, 1_595_616)
    counts = [sidecar.fields[f"delta_mem.{key}"].value for key in ("tensor_count", "total_numel", "total_bytes")]
    assert counts == [186, 797_808, 1_595_616]
    assert len(sidecar.tensors) == 186 and sum(len(t.data) for t in sidecar.tensors.values()) == 1_595_616
    a_layer = Counter(name.split(".")[1] for name in sidecar.tensors)
    assert a_layer == dict.fromkeys("012345", published["tensors_per_layer"])
    assert {t.dtype for t in sidecar.tensors.values()} == {published["dtype"]}
    # keys and manifest are all that may differ from the published file in size
    assert abs(e4b.sidecar.stat().st_size - published["file_bytes"]) < 10_000


def test_the_published_widths(e4b: E4B) -> None:
    sidecar = read_sidecar(e4b.sidecar)
    assert sidecar.tensors["blk.0.delta_q"].shape == (2048, 8) and sidecar.tensors["blk.5.delta_q"].shape == (4096, 8)
    assert sidecar.tensors["blk.0.rwkv.w1"].shape == (8, 32)
    entries = json.loads(sidecar.fields["delta_mem.per_layer_attention_json"].value)
    kinds = [entry["attention_kind"] for entry in entries]
    assert kinds == ["sliding_attention"] * 5 + ["full_attention"]
    for entry in entries:
        assert entry.items() >= e4b.published["widths"][entry["attention_kind"]].items()
    layers = read_base(e4b.base).layers
    assert len(layers) == 42 and [la.layer for la in layers if la.attention_kind == "full_attention"] == [
        *range(5, 42, 6)
    ]


def test_the_same_seed_gives_the_same_checkpoint(e4b: E4B, tmp_path: Path) -> None:
    tool = ROOT / "tools" / "make_checkpoint.py"
    for seed in ("0", "1"):
        subprocess.run([sys.executable, tool, SHAPE, "--output", tmp_path / seed, "--seed", seed], check=True)
    assert compare(tmp_path / "0", e4b.checkpoint).same and not compare(tmp_path / "1", e4b.checkpoint).same
