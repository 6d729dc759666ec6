"""What `llamamem sidecar export` writes, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from sidecar_edits import requantised

from llamamem.errors import LlamamemError
from llamamem.formats.checkpoint import read_checkpoint
from llamamem.formats.checkpoint.writer import safetensors, write_checkpoint
from llamamem.formats.gguf_file import GgufField, GgufTensor, write_gguf
from llamamem.formats.sidecar import read_sidecar, short_name
from llamamem.formats.sidecar.export import export_sidecar
from llamamem.formats.sidecar.tensor_types import bf16, convert

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
    as_written = safetensors(tensors.values())
    (tmp_path / "delta_mem_adapter.safetensors").write_bytes(as_written)
    for name in ("delta_mem_config.json", "adapter_metadata.json"):
        shutil.copy(model_a / name, tmp_path)
    export_sidecar(tmp_path, model_a / BASE, tmp_path / "b.gguf")
    assert (tmp_path / "b.gguf").read_bytes() == exported.read_bytes()


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
    assert "delta_mem_config.json: rank is 0" in export(rank=0)
    assert "has shape" in export(rank=9)
    for member in ("alpha", "rwkv_ms_semantics_version", "rwkv_ms_chunk_size"):
        for value in (None, "8", [8], True, 1e300):
            assert member in export(**{member: value})
    assert "[config-value] delta_mem_config.json: alpha is null" in export(alpha=None)
    assert "delta head k is active on layer 6" in export(target_layers=[6], delta_heads=["k", "", "kv", 1, []])
    assert "delta_heads_json" in export(delta_heads=["q", "", "kv", 1, []])
    assert "no such file" in export(base=tmp_path / "nowhere.gguf")
    assert "not a GGUF file" in export(base=tmp_path / "delta_mem_adapter.pt")
    assert "directory does not exist" in export(output=tmp_path / "nowhere" / "x.gguf")
    assert "is a directory" in export(output=tmp_path)
    copy = shutil.copy(model_a / BASE, tmp_path / "base.gguf")
    assert "is the input itself" in export(base=copy, output=copy)
    for name in ("delta_mem_adapter.pt", "delta_mem_config.json"):
        assert "is the input itself" in export(output=tmp_path / name)
    typo = shutil.copy(model_a / BASE, tmp_path / "other-base.gguf")
    assert "is there and is not a sidecar" in export(output=typo)
    assert typo.read_bytes() == (model_a / BASE).read_bytes()
    assert (tmp_path / "base.gguf").read_bytes() == (model_a / BASE).read_bytes()
    with zipfile.ZipFile(tmp_path / "delta_mem_adapter.pt", "w") as archive:
        archive.writestr("x/data.pkl", b"cos\nsystem\n(S'true'\ntR.")
    assert "refused" in export()
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("head", "kv")
def test_a_delta_of_keys_that_are_values_too(head: str, model_a: Path, tmp_path: Path) -> None:
    base = requantised(model_a, tmp_path / "base.gguf", without="blk.3.attn_v.weight")
    config = json.loads((model_a / "delta_mem_config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"delta_heads": [head]}))
    with pytest.raises(LlamamemError, match=f"delta head {head} is active on layer 3.* its values are its keys") as e:
        export_sidecar(model_a, base, tmp_path / "x.gguf", config=str(tmp_path / "config.json"))
    assert e.value.reason == "base-heads" and not (tmp_path / "x.gguf").exists()
    export_sidecar(model_a, base, tmp_path / "x.gguf")  # of q and o


def test_a_base_of_another_architecture_or_hidden_size(model_a: Path, tmp_path: Path) -> None:
    fields = {"general.architecture": GgufField(STRING, "llama")}
    write_gguf(tmp_path / "llama.gguf", fields, [GgufTensor("x", "F32", (1,), bytes(4))])
    with pytest.raises(LlamamemError, match="architecture is 'llama'"):
        export_sidecar(model_a, tmp_path / "llama.gguf", tmp_path / "x.gguf")
    shards = GgufField(gguf.GGUFValueType.UINT16, 3)
    split = {"general.architecture": GgufField(STRING, "gemma4"), "split.count": shards}
    write_gguf(tmp_path / "split.gguf", split, [GgufTensor("x", "F32", (1,), bytes(4))])
    with pytest.raises(LlamamemError, match="is number 1 of 3 files: name it"):
        export_sidecar(model_a, tmp_path / "split.gguf", tmp_path / "x.gguf")


def test_everything_is_checked_before_anything_is_hashed(
    model_a: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hashed(*_: Any) -> str:
        raise AssertionError("the base was hashed")

    monkeypatch.setattr("llamamem.formats.sidecar.export.base_sha256", hashed)
    with pytest.raises(AssertionError):  # where nothing is wrong
        export_sidecar(model_a, model_a / BASE, tmp_path / "x.gguf")
    (tmp_path / "notes").write_text("mine")
    for changes in (
        {"output": tmp_path / "notes"},
        {"output": tmp_path / "no" / "x.gguf"},
        {"manifest": tmp_path / "no" / "x.json"},
        {"manifest": tmp_path / "notes"},
        {"manifest": tmp_path / "x.gguf"},
        {"manifest": model_a / "adapter_metadata.json"},
        {"mmproj": model_a / BASE},
        {"mmproj": tmp_path / "notes"},
        {"config": "nowhere.json"},
    ):
        paths: dict[str, Any] = {"output": tmp_path / "x.gguf"} | changes
        with pytest.raises(LlamamemError):
            export_sidecar(model_a, model_a / BASE, **paths)
    assert {path.name for path in tmp_path.iterdir()} == {"notes"}


def projector(path: Path, **keys: str) -> Path:
    fields = {f"general.{key}": GgufField(STRING, value) for key, value in keys.items()}
    write_gguf(path, fields, [GgufTensor("mm.0.weight", "F32", (1,), bytes(4))])
    return path


@pytest.mark.parametrize("keys", [{"architecture": "clip"}, {"architecture": "clip", "type": "mmproj"}])
def test_the_projector_is_recorded(keys: dict[str, str], model_a: Path, tmp_path: Path) -> None:
    mmproj = projector(tmp_path / "mmproj.gguf", **keys)
    told: list[int] = []
    sidecar = export_sidecar(model_a, model_a / BASE, tmp_path / "x.gguf", mmproj=mmproj, progress=told.append)
    assert sidecar.fields["delta_mem.mmproj_gguf"].value == "mmproj.gguf"
    assert sidecar.fields["delta_mem.mmproj_gguf_sha256"].value == hashlib.sha256(mmproj.read_bytes()).hexdigest()
    assert sum(told) == (model_a / BASE).stat().st_size + mmproj.stat().st_size


def test_a_file_that_is_no_projector(llamamem: Callable[..., Any], model_a: Path, tmp_path: Path) -> None:
    other = projector(tmp_path / "other.gguf", architecture="gemma4", type="model")
    args = ("--base", model_a / BASE, "--output", tmp_path / "x.gguf", "--mmproj")
    for path, says in ((other, "no multimodal projector"), (model_a / "config.json", "not a GGUF file")):
        result = llamamem("sidecar", "export", model_a, *args, path)
        assert result.status == 2 and says in result.err and str(path) in result.err and result.err.count("\n") == 1


def test_the_default_output(
    llamamem: Callable[..., Any], exported: Path, model_a: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert llamamem("sidecar", "export", model_a, "--base", model_a / BASE).status == 0
    assert (tmp_path / "model_a.sidecar.gguf").read_bytes() == exported.read_bytes()


def test_the_manifest_file(llamamem: Callable[..., Any], model_a: Path, tmp_path: Path) -> None:
    path, manifest = tmp_path / "x.gguf", tmp_path / "x.json"
    args = ("sidecar", "export", model_a, "--base", model_a / BASE, "--output", path, "--manifest", manifest)
    assert llamamem(*args).status == 0
    first = manifest.read_bytes()
    assert llamamem(*args).status == 0  # its own kind is replaced
    assert manifest.read_bytes() == first
    value = json.loads(first)
    assert (value["sidecar"], value["bytes"]) == ("x.gguf", path.stat().st_size)
    assert value["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert value["metadata"]["delta_mem.config_json"] == json.loads((model_a / "delta_mem_config.json").read_text())
    assert value["metadata"]["delta_mem.base_gguf"] == BASE
    assert len(value["tensors"]) == 186 and value["tensors"][0]["source_name"] == SOURCE.format(0, "beta_proj")
    assert str(tmp_path) not in first.decode()


def test_the_order_of_the_config_is_kept(model_a: Path, tmp_path: Path) -> None:
    config = json.loads((model_a / "delta_mem_config.json").read_text())
    turned = dict(reversed(config.items()))
    (tmp_path / "turned.json").write_text(json.dumps(turned))
    sidecar = export_sidecar(model_a, model_a / BASE, tmp_path / "x.gguf", config=str(tmp_path / "turned.json"))
    assert list(sidecar.config) == list(turned) != list(config)


def test_types_are_converted(llamamem: Callable[..., Any], exported: Path, model_a: Path, tmp_path: Path) -> None:
    args = ("--base", model_a / BASE, "--output", tmp_path / "x.gguf", "--dtype")
    assert llamamem("sidecar", "export", model_a, *args, "f32").status == 0
    kept, wide = read_sidecar(exported), read_sidecar(tmp_path / "x.gguf")
    assert {t.dtype for t in wide.tensors.values()} == {"F32"}
    for layer in range(6):
        for name, array in kept.weights(layer).items():
            np.testing.assert_array_equal(wide.weights(layer)[name], array)
    assert llamamem("sidecar", "export", model_a, *args, "bf16").status == 0
    assert (tmp_path / "x.gguf").read_bytes() == exported.read_bytes()


def test_rounding_to_bf16() -> None:
    def rounded(*bits: int) -> list[int]:
        return np.frombuffer(bf16(np.array(bits, np.uint32).view(np.float32)), "<u2").tolist()

    assert rounded(0x3F808000, 0x3F818000, 0x3F808001, 0x3F817FFF) == [0x3F80, 0x3F82, 0x3F81, 0x3F81]  # ties to even
    assert rounded(0x7F800000, 0xFF800000, 0x80000000) == [0x7F80, 0xFF80, 0x8000]
    assert all(bits & 0x7F80 == 0x7F80 and bits & 0x7F for bits in rounded(0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF))  # NaN
    half = GgufTensor("x", "F16", (2,), np.array([0.1, 65504], "<f2").tobytes())
    assert convert(half, "BF16").data == bf16(np.array([0.1, 65504], "<f2").astype(np.float32))


def test_a_value_that_bf16_cannot_hold(model_a: Path, tmp_path: Path) -> None:
    tensors = dict(read_checkpoint(model_a).tensors)
    name = SOURCE.format(2, "delta_q_proj")
    data = np.full(tensors[name].shape, 3.4e38, "<f4").tobytes()
    tensors[name] = GgufTensor(name, "F32", tensors[name].shape, data)
    config = json.loads((model_a / "delta_mem_config.json").read_text())
    write_checkpoint(tmp_path / "big", tensors.values(), config, {})
    with pytest.raises(LlamamemError, match=r"delta_mem_adapter\.pt: tensor '.*2\.self_attn\.delta_q_proj': 3.4e\+38"):
        export_sidecar(tmp_path / "big", model_a / BASE, tmp_path / "x.gguf", dtype="bf16")
    export_sidecar(tmp_path / "big", model_a / BASE, tmp_path / "x.gguf")
