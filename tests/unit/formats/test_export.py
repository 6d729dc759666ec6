"""What `llamamem sidecar export` and `zero` write, and what they refuse."""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest

from llamamem.errors import LlamamemError
from llamamem.formats.checkpoint import read_checkpoint
from llamamem.formats.gguf_file import GgufField, GgufTensor, write_gguf
from llamamem.formats.sidecar import read_sidecar, short_name
from llamamem.formats.sidecar_export import export_sidecar, zero_sidecar

BASE = "model-f32.gguf"
STRING = gguf.GGUFValueType.STRING
SOURCE = "model.language_model.layers.{}.self_attn.{}"


def test_export_by_the_command_line(llamamem: Callable[..., Any], model_a: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    config = "delta_mem_config_v2.json"
    args = ("--base", model_a / BASE, "--output", path, "--config", config, "--checkpoint-repo", "somewhere/a")
    result = llamamem("sidecar", "export", model_a, *args)
    assert result.status == 0 and result.out == ""
    assert "semantics 2" in result.err and "186 tensors" in result.err
    first = path.read_bytes()
    assert llamamem("sidecar", "export", model_a, *args).status == 0
    assert path.read_bytes() == first
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_as_another_reader_sees_it(exported: Path, model_a: Path) -> None:
    reader = gguf.GGUFReader(exported)

    def get(key: str) -> Any:
        field = reader.get_field(key)
        assert field is not None, key
        return field.contents()

    assert get("general.architecture") == "rwkv_ms_memory" and reader.alignment == 32
    assert get("delta_mem.schema") == "delta_mem_rwkv_ms_memory_gguf_sidecar.v2"
    assert [get(f"delta_mem.{k}") for k in ("format_version", "rwkv_ms_semantics_version", "tensor_count")] == [
        2,
        1,
        186,
    ]
    assert [get(f"delta_mem.{k}") for k in ("rank", "alpha", "rwkv_ms_chunk_size")] == [8, 16.0, 48]
    assert get("delta_mem.base_gguf") == BASE and get("delta_mem.mmproj_gguf") == ""
    assert get("delta_mem.base_gguf_sha256") == hashlib.sha256((model_a / BASE).read_bytes()).hexdigest()
    assert json.loads(get("delta_mem.target_layers_json")) == [0, 1, 2, 3, 4, 5]
    assert json.loads(get("delta_mem.config_json")) == json.loads((model_a / "delta_mem_config.json").read_text())
    attention = json.loads(get("delta_mem.per_layer_attention_json"))
    widths = {"q_out": 64, "k_out": 32, "v_out": 32, "o_out": 64}
    heads = {"active_delta_heads": ["q", "o"], "compat_delta_heads": ["k", "v"]}
    assert attention[0] == {"layer": 0, "attention_kind": "sliding_attention"} | widths | heads
    wide = {"q_out": 128, "k_out": 64, "v_out": 64, "o_out": 64}
    assert attention[5] == {"layer": 5, "attention_kind": "full_attention"} | wide | heads
    assert get("delta_mem.total_numel") == sum(t.n_elements for t in reader.tensors)
    assert get("delta_mem.total_bytes") == sum(t.n_bytes for t in reader.tensors)

    source = read_checkpoint(model_a).tensors
    manifest = {entry["name"]: entry for entry in json.loads(get("delta_mem.tensor_manifest_json"))}
    assert len(reader.tensors) == len(manifest) == len(source) == 186
    for tensor in reader.tensors:
        entry = manifest[tensor.name]
        original = source[entry["source_name"]]
        assert tensor.tensor_type.name == entry["gguf_type"] == "BF16" and len(tensor.name) < 64
        assert tuple(reversed(tensor.shape.tolist())) == tuple(entry["shape"]) == original.shape
        assert tensor.data.tobytes() == original.data
        assert entry["sha256_raw"] == hashlib.sha256(original.data).hexdigest()


@pytest.mark.parametrize(
    ("source", "name"),
    [
        (SOURCE.format(3, "memory_v_proj"), "blk.3.mem_v"),
        (SOURCE.format(12, "beta_bias"), "blk.12.beta_b"),
        (SOURCE.format(0, "lambda_proj"), "blk.0.lambda"),
        (SOURCE.format(0, "delta_o_proj"), "blk.0.delta_o"),
        (SOURCE.format(5, "hrm_rwkv7_core.receptance.weight"), "blk.5.rwkv.receptance.weight"),
        (SOURCE.format(5, "hrm_rwkv7_core.x_r"), "blk.5.rwkv.x_r"),
        ("something.else", "tensor." + hashlib.sha1(b"something.else").hexdigest()[:16]),
        (SOURCE.format(0, "q_proj"), "tensor." + hashlib.sha1(SOURCE.format(0, "q_proj").encode()).hexdigest()[:16]),
    ],
)
def test_names(source: str, name: str) -> None:
    assert short_name(source) == name


def test_safetensors_and_pt_give_the_same_sidecar(exported: Path, model_a: Path, tmp_path: Path) -> None:
    tensors = dict(reversed(read_checkpoint(model_a).tensors.items()))
    header, data = {}, b""
    for name, t in tensors.items():
        offsets = [len(data), len(data) + len(t.data)]
        header[name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": offsets}
        data += t.data
    text = json.dumps(header).encode()
    (tmp_path / "delta_mem_adapter.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    for name in ("delta_mem_config.json", "adapter_metadata.json"):
        shutil.copy(model_a / name, tmp_path)
    export_sidecar(tmp_path, model_a / BASE, tmp_path / "b.gguf")
    assert (tmp_path / "b.gguf").read_bytes() == exported.read_bytes()


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
        (tmp_path / "text.gguf", "not a GGUF file"),
        (tmp_path / "nowhere.gguf", "no such file"),
        (tmp_path, "cannot be read"),
    ):
        result = llamamem("sidecar", "zero", path, "--output", tmp_path / "out.gguf")
        assert result.status == 2 and says in result.err and str(path) in result.err
        assert result.err.count("\n") == 1


def test_export_says_what_does_not_fit(llamamem: Callable[..., Any], model_a: Path, tmp_path: Path) -> None:
    config = json.loads((model_a / "delta_mem_config.json").read_text())
    for name in ("delta_mem_adapter.pt", "adapter_metadata.json"):
        shutil.copy(model_a / name, tmp_path)

    def export(base: Path = model_a / BASE, output: Path = tmp_path / "x.gguf", **changes: Any) -> str:
        (tmp_path / "delta_mem_config.json").write_text(json.dumps(config | changes))
        result = llamamem("sidecar", "export", tmp_path, "--base", base, "--output", output)
        assert result.status == 2 and result.err.count("\n") == 1 and not (tmp_path / "x.gguf").exists()
        return result.err

    assert "target layer 12 is not one of the 12" in export(target_layers=[0, 12])
    assert "delta head k is active on layer 6" in export(
        target_layers=[6], delta_heads=["k"]
    )  # shares the keys of an earlier layer
    assert "rank 9" in export(rank=9) or "has shape" in export(rank=9)
    assert "no such file" in export(base=tmp_path / "nowhere.gguf")
    assert "not a GGUF file" in export(base=tmp_path / "delta_mem_adapter.pt")
    assert "directory does not exist" in export(output=tmp_path / "nowhere" / "x.gguf")
    assert "is a directory" in export(output=tmp_path)
    copy = shutil.copy(model_a / BASE, tmp_path / "base.gguf")
    assert "is the input itself" in export(base=copy, output=copy)
    assert (tmp_path / "base.gguf").read_bytes() == (model_a / BASE).read_bytes()
    with zipfile.ZipFile(tmp_path / "delta_mem_adapter.pt", "w") as archive:
        archive.writestr("x/data.pkl", b"cos\nsystem\n(S'true'\ntR.")
    assert "refused" in export()
    assert not list(tmp_path.glob("*.part"))


def test_a_base_of_another_architecture_or_hidden_size(model_a: Path, tmp_path: Path) -> None:
    fields = {"general.architecture": GgufField(STRING, "llama")}
    write_gguf(tmp_path / "llama.gguf", fields, [GgufTensor("x", "F32", (1,), bytes(4))])
    with pytest.raises(LlamamemError, match="architecture is 'llama'"):
        export_sidecar(model_a, tmp_path / "llama.gguf", tmp_path / "x.gguf")
    shards = GgufField(gguf.GGUFValueType.UINT16, 3)
    split = {"general.architecture": GgufField(STRING, "gemma4"), "split.count": shards}
    write_gguf(tmp_path / "split.gguf", split, [GgufTensor("x", "F32", (1,), bytes(4))])
    with pytest.raises(LlamamemError, match="split into several files"):
        export_sidecar(model_a, tmp_path / "split.gguf", tmp_path / "x.gguf")


def test_zero_leaves_its_input_alone(exported: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(exported, tmp_path / "a.gguf"))
    with pytest.raises(LlamamemError, match="is the input itself"):
        zero_sidecar(path, path)
    assert path.read_bytes() == exported.read_bytes()
