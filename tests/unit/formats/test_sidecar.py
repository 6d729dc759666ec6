"""Reading a sidecar: both versions load, and everything else is refused with the key or tensor at fault."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamamem.errors import LlamamemError
from llamamem.formats.checkpoint import read_checkpoint
from llamamem.formats.gguf_file import GgufField, GgufTensor, write_gguf
from llamamem.formats.sidecar import PREFIX, TYPES, Sidecar, manifest_entry, read_sidecar
from llamamem.formats.sidecar_export import export_sidecar

BASE = "model-f32.gguf"
SOURCE = "model.language_model.layers.{}.self_attn.{}"


def test_weights_are_the_checkpoints(exported: Path, model_a: Path) -> None:
    weights = read_sidecar(exported).weights(5)
    assert len(weights) == 31 and weights["delta_q"].shape == (128, 8) and weights["mem_v"].shape == (8, 64)
    raw = read_checkpoint(model_a).tensors[SOURCE.format(5, "beta_proj")].data
    high = np.frombuffer(raw, "<u2").astype(np.uint32) << 16
    np.testing.assert_array_equal(weights["beta"].reshape(-1), high.view(np.float32))


# edits of a good sidecar


def edited(sidecar: Sidecar, path: Path, values: dict[str, Any], tensors: list[GgufTensor] | None = None) -> Path:
    """A copy with other values of keys (without the prefix; None: left out), and a manifest that fits the tensors."""
    fields = dict(sidecar.fields)
    tensors = list(sidecar.tensors.values()) if tensors is None else tensors
    sources = {e["name"]: e["source_name"] for e in json.loads(fields[f"{PREFIX}tensor_manifest_json"].value)}
    fitting: dict[str, Any] = {
        "tensor_manifest_json": json.dumps([manifest_entry(t, sources.get(t.name, "x")) for t in tensors]),
        "tensor_count": len(tensors),
        "total_numel": sum(int(np.prod(t.shape)) for t in tensors),
        "total_bytes": sum(len(t.data) for t in tensors),
    }
    for key, value in (fitting | values).items():
        full = key if "." in key else PREFIX + key
        if value is None:
            fields.pop(full)
        else:
            fields[full] = value if isinstance(value, GgufField) else GgufField(TYPES[key], value)
    write_gguf(path, fields, tensors)
    return path


def config_with(sidecar: Sidecar, drop: str = "", **changes: Any) -> dict[str, Any]:
    config = {k: v for k, v in (sidecar.config | changes).items() if k != drop}
    return {"config_json": json.dumps(config)}


def test_manifests_of_other_writers_load(exported: Path, tmp_path: Path) -> None:
    sidecar = read_sidecar(exported)
    manifest = json.loads(sidecar.fields[f"{PREFIX}tensor_manifest_json"].value)
    for entry in manifest:
        entry |= {"gguf_type": "GGMLQuantizationType.BF16", "torch_dtype": "bfloat16", "note": 1}
    keys = {"tensor_manifest_json": json.dumps(manifest, indent=1), "base_gguf_sha256": sidecar.base_sha256.upper()}
    again = read_sidecar(edited(sidecar, tmp_path / "x.gguf", keys))
    assert again.tensors == sidecar.tensors and again.base_sha256 == sidecar.base_sha256


def test_version_1_files_load(exported: Path, tmp_path: Path) -> None:
    keys = {"schema": "delta_mem_rwkv_ms_memory_gguf_sidecar.v1", "format_version": 1}
    absent: dict[str, Any] = {"rwkv_ms_semantics_version": None, "rwkv_ms_state_dtype": None}
    old = read_sidecar(edited(read_sidecar(exported), tmp_path / "v1.gguf", keys | absent))
    assert (old.format_version, old.semantics, len(old.tensors)) == (1, 1, 186)
    new = read_sidecar(exported)
    assert (new.format_version, new.layers, new.config) == (2, old.layers, old.config)


@pytest.mark.parametrize("dtype", ["F16", "F32"])
def test_other_types_of_tensor_load(dtype: str, exported: Path, tmp_path: Path) -> None:
    sidecar = read_sidecar(exported)
    kind = {"F16": "<f2", "F32": "<f4"}[dtype]
    tensors = [
        replace(
            t, dtype=dtype, data=sidecar.weights(int(name.split(".")[1]))[name.split(".", 2)[2]].astype(kind).tobytes()
        )
        for name, t in sidecar.tensors.items()
    ]
    again = read_sidecar(edited(sidecar, tmp_path / "x.gguf", {}, tensors))
    np.testing.assert_allclose(again.weights(2)["delta_o"], sidecar.weights(2)["delta_o"], rtol=1e-3, atol=1e-7)


U32, STRING, ARRAY = gguf.GGUFValueType.UINT32, gguf.GGUFValueType.STRING, gguf.GGUFValueType.ARRAY


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"general.architecture": GgufField(STRING, "gemma4")}, "architecture is 'gemma4'"),
        ({"general.alignment": GgufField(U32, 16)}, "general.alignment"),
        ({"schema": "other.v2"}, "delta_mem.schema"),
        ({"schema": "delta_mem_rwkv_ms_memory_gguf_sidecar.v1"}, "delta_mem.schema"),
        ({"format_version": 3}, "delta_mem.format_version"),
        ({"rwkv_ms_semantics_version": 3}, "rwkv_ms_semantics_version"),
        ({"rwkv_ms_semantics_version": 2}, "rwkv_ms_semantics_version"),  # config_json says 1
        ({"rwkv_ms_semantics_version": None}, "rwkv_ms_semantics_version"),
        ({"rwkv_ms_state_dtype": "f16"}, "rwkv_ms_state_dtype"),
        ({"tensor_name_format": "plain"}, "tensor_name_format"),
        ({"base_gguf_sha256": None}, "base_gguf_sha256"),
        ({"base_gguf_sha256": "xyz"}, "base_gguf_sha256"),
        ({"memory_backend": "other"}, "memory_backend"),
        ({"memory_readout_mode": "gated"}, "memory_readout_mode"),
        ({"rwkv_ms_boundary_mode": "sentence"}, "rwkv_ms_boundary_mode"),
        ({"rank": 4}, "delta_mem.rank"),
        ({"rank": GgufField(gguf.GGUFValueType.UINT64, 8)}, "delta_mem.rank' has type UINT64"),
        ({"rank": GgufField(ARRAY, [8])}, "delta_mem.rank' has type ARRAY"),
        ({"alpha": 8.0}, "delta_mem.alpha"),
        ({"alpha": float("nan")}, "delta_mem.alpha"),
        ({"rwkv_ms_num_states": 8}, "rwkv_ms_num_states"),
        ({"num_state_heads": 2}, "num_state_heads"),
        ({"tensor_count": 185}, "tensor_count"),
        ({"total_numel": 1}, "total_numel"),
        ({"total_bytes": 1}, "total_bytes"),
        ({"target_layers_json": "[0,1,2]"}, "per_layer_attention_json"),
        ({"target_layers_json": "[0,1,2,3,5,4]"}, "target_layers_json"),
        ({"target_layers_json": "[0,"}, "target_layers_json"),
        ({"delta_heads_json": '["q","x"]'}, "delta_heads_json"),
        ({"delta_heads_json": '["q"]'}, "delta_heads"),
        ({"delta_heads_json": "[]"}, "delta_heads_json"),
        ({"per_layer_attention_json": "[1,2,3,4,5,6]"}, "per_layer_attention_json"),
        ({"config_json": "[]"}, "config_json"),
        ({"config_json": None}, "config_json"),
        ({"tensor_manifest_json": "[]"}, "manifest"),
        ({"memory_type": GgufField(U32, 1)}, "memory_type"),
        ({"delta_mem.new_feature": GgufField(U32, 1)}, "delta_mem.new_feature"),
        ({"gemma4.rope": GgufField(U32, 1)}, "gemma4.rope"),
    ],
)
def test_keys_that_are_refused(values: dict[str, Any], named: str, exported: Path, tmp_path: Path) -> None:
    path = edited(read_sidecar(exported), tmp_path / "bad.gguf", values)
    with pytest.raises(LlamamemError) as caught:
        read_sidecar(path)
    assert str(path) in str(caught.value) and named in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("memory_readout_mode", "projected_kv"),
        ("rwkv_ms_boundary_mode", "sentence"),
        ("rwkv_ms_write_mode", "gated"),
        ("memory_fusion_mode", "gate"),
        ("memory_fusion_placement", "residual"),
        ("memory_write_granularity", "message"),
        ("trainable_delta_scale", True),
        ("delta_o_rmsnorm", True),
        ("rwkv_ms_anchor_capacity", 16),
        ("rwkv_ms_read_top_k", 2),
        ("rwkv_ms_mask_empty_slots", True),
        ("rwkv_ms_read_temperature", 0.5),
        ("num_memory_partitions", 4),
        ("num_memory_partitions", True),
        ("state_update_mode", "other"),
        ("couple_lambda", 1),
        ("rankwise_gates", None),
        ("rwkv_ms_erase_gate", "1.0"),
        ("rwkv_ms_erase_gate", 1e300),  # infinite in fp32
        ("rwkv_ms_chunk_size", 0),
        ("rwkv_ms_chunk_size", 48.0),
        ("rwkv_ms_state_dtype", "bf16"),
        ("something_new", 0),
    ],
)
def test_configs_that_are_refused(key: str, value: Any, exported: Path, model_a: Path, tmp_path: Path) -> None:
    sidecar = read_sidecar(exported)
    path = edited(sidecar, tmp_path / "bad.gguf", config_with(sidecar, **{key: value}))
    with pytest.raises(LlamamemError, match=rf"bad\.gguf: config_json: .*{key}"):
        read_sidecar(path)
    (tmp_path / "delta_mem_config.json").write_text(config_with(sidecar, **{key: value})["config_json"])
    shutil.copy(model_a / "delta_mem_adapter.pt", tmp_path)
    with pytest.raises(LlamamemError, match=key):
        export_sidecar(tmp_path, model_a / BASE, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_keys_of_the_config_that_must_be_there(exported: Path, tmp_path: Path) -> None:
    sidecar = read_sidecar(exported)
    for key in ("rank", "alpha", "rwkv_ms_erase_gate", "state_update_mode", "couple_lambda", "target_layers"):
        path = edited(sidecar, tmp_path / "bad.gguf", config_with(sidecar, drop=key))
        with pytest.raises(LlamamemError, match=key):
            read_sidecar(path)


def test_tensors_that_are_refused(exported: Path, tmp_path: Path) -> None:
    sidecar = read_sidecar(exported)
    good = list(sidecar.tensors.values())
    at = {t.name: i for i, t in enumerate(good)}

    def changed(name: str, **changes: Any) -> list[GgufTensor]:
        return [replace(t, **changes) if t.name == name else t for t in good]

    matrix = sidecar.tensors["blk.2.mem_v"]
    nan = np.frombuffer(matrix.data, "<u2").copy()
    nan[7] = 0x7FC0
    extra = GgufTensor("blk.2.rwkv.new", "BF16", (8,), bytes(16))
    other = GgufTensor("tensor.11f6ad8ec52a2984", "BF16", (8,), bytes(16))
    cases = {
        "'blk.2.mem_v' .* is missing": good[: at["blk.2.mem_v"]] + good[at["blk.2.mem_v"] + 1 :],
        "'blk.2.mem_v' has shape": changed("blk.2.mem_v", shape=(64, 8)),
        "'blk.2.mem_v' holds NaN": changed("blk.2.mem_v", data=nan.tobytes()),
        "'blk.5.delta_q' has shape": changed("blk.5.delta_q", shape=(64, 16)),
        "'blk.5.rwkv.w2' has shape": changed("blk.5.rwkv.w2", shape=(16, 16)),
        "'blk.2.rwkv.new' is unknown": [*good, extra],
        "'tensor.11f6ad8ec52a2984' is unknown": [*good, other],
        "'blk.9.mem_v' is unknown": [*good, replace(matrix, name="blk.9.mem_v")],
        "'blk.2.lambda' is unknown": [*good, replace(matrix, name="blk.2.lambda")],
    }
    for message, tensors in cases.items():
        path = edited(sidecar, tmp_path / "bad.gguf", {}, tensors)
        with pytest.raises(LlamamemError, match=message):
            read_sidecar(path)


def test_a_changed_byte_of_a_tensor_is_noticed(exported: Path, tmp_path: Path) -> None:
    data = bytearray(exported.read_bytes())
    data[-32] ^= 1  # the last tensor has 16 bytes and as many of padding
    (tmp_path / "bad.gguf").write_bytes(data)
    with pytest.raises(LlamamemError, match="sha256_raw"):
        read_sidecar(tmp_path / "bad.gguf")


def test_bytes_after_the_last_tensor(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(exported.read_bytes() + bytes(5))
    with pytest.raises(LlamamemError, match="5 bytes follow its last tensor"):
        read_sidecar(tmp_path / "bad.gguf")


def test_a_tensor_that_is_there_twice_or_of_another_type(exported: Path, tmp_path: Path) -> None:
    data = exported.read_bytes()
    at = data.rindex(b"blk.1.mem_v")
    (tmp_path / "bad.gguf").write_bytes(data[:at] + b"blk.0.mem_v" + data[at + 11 :])
    with pytest.raises(LlamamemError, match=r"tensor 'blk\.0\.mem_v' is there twice"):
        read_sidecar(tmp_path / "bad.gguf")
    kind = at + 11 + 4 + 16  # name, number of dimensions, two dimensions
    assert data[kind] == gguf.GGMLQuantizationType.BF16
    (tmp_path / "bad.gguf").write_bytes(data[:kind] + bytes([gguf.GGMLQuantizationType.I16]) + data[kind + 1 :])
    with pytest.raises(LlamamemError, match=r"tensor 'blk\.1\.mem_v' has type I16"):
        read_sidecar(tmp_path / "bad.gguf")


def test_manifest_entries_are_checked(exported: Path, tmp_path: Path) -> None:
    sidecar = read_sidecar(exported)
    manifest = json.loads(sidecar.fields[f"{PREFIX}tensor_manifest_json"].value)
    for key, value in (("sha256_raw", "0" * 64), ("shape", [1]), ("source_name", "x"), ("name", manifest[1]["name"])):
        bad = [manifest[0] | {key: value}, *manifest[1:]]
        path = edited(sidecar, tmp_path / "bad.gguf", {"tensor_manifest_json": json.dumps(bad)})
        with pytest.raises(LlamamemError, match=manifest[0]["name"] if key != "name" else manifest[1]["name"]):
            read_sidecar(path)


def test_cut_files_are_refused(exported: Path, tmp_path: Path) -> None:
    data = exported.read_bytes()
    path = tmp_path / "cut.gguf"
    for size in [0, 3, 4, 8, 23, 24, 100, *range(1000, len(data), 997), len(data) - 32]:
        path.write_bytes(data[:size])
        with pytest.raises(LlamamemError, match=r"cut\.gguf: ") as caught:
            read_sidecar(path)
        assert "\n" not in str(caught.value)


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
