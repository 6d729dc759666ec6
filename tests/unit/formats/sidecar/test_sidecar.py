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
from sidecar_edits import attention_of, config_with, edited, manifest_of

from llamamem.errors import LlamamemError
from llamamem.formats.checkpoint import read_checkpoint
from llamamem.formats.gguf_file import GgufField, GgufTensor
from llamamem.formats.sidecar import read_sidecar
from llamamem.formats.sidecar.export import export_sidecar

BASE = "model-f32.gguf"
SOURCE = "model.language_model.layers.{}.self_attn.{}"


def test_weights_are_the_checkpoints(exported: Path, model_a: Path) -> None:
    weights = read_sidecar(exported).weights(5)
    assert len(weights) == 31 and weights["delta_q"].shape == (128, 8) and weights["mem_v"].shape == (8, 64)
    raw = read_checkpoint(model_a).tensors[SOURCE.format(5, "beta_proj")].data
    high = np.frombuffer(raw, "<u2").astype(np.uint32) << 16
    np.testing.assert_array_equal(weights["beta"].reshape(-1), high.view(np.float32))


def test_manifests_of_other_writers_load(exported: Path, tmp_path: Path) -> None:
    sidecar = read_sidecar(exported)
    manifest = manifest_of(sidecar)
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


U32, U64, STRING, ARRAY = (gguf.GGUFValueType[name] for name in ("UINT32", "UINT64", "STRING", "ARRAY"))


def refusal(path: Path) -> LlamamemError:
    with pytest.raises(LlamamemError) as caught:
        read_sidecar(path)
    error = caught.value
    assert str(error).startswith(f"{path}: [{error.reason}] ") and "\n" not in str(error)
    return error


@pytest.mark.parametrize(
    ("values", "reason", "named"),
    [
        ({"general.architecture": GgufField(STRING, "gemma4")}, "not-a-sidecar", "general.architecture' is 'gemma4'"),
        ({"general.alignment": GgufField(U32, 16)}, "alignment", "general.alignment"),
        ({"general.alignment": GgufField(U64, 32)}, "alignment", "general.alignment"),
        ({"format_version": None}, "key-missing", "delta_mem.format_version"),
        ({"format_version": 3}, "format-version", "delta_mem.format_version"),
        ({"format_version": GgufField(U64, 2)}, "key-type", "delta_mem.format_version"),
        ({"schema": "other.v2"}, "schema", "delta_mem.schema"),
        ({"schema": "delta_mem_rwkv_ms_memory_gguf_sidecar.v1"}, "schema", "delta_mem.schema"),
        ({"rwkv_ms_semantics_version": 3}, "semantics-version", "rwkv_ms_semantics_version"),
        ({"rwkv_ms_semantics_version": 2}, "disagree", "rwkv_ms_semantics_version"),  # config_json says 1
        ({"rwkv_ms_semantics_version": None}, "key-missing", "rwkv_ms_semantics_version"),
        ({"rwkv_ms_state_dtype": "f16"}, "unsupported", "rwkv_ms_state_dtype"),
        ({"tensor_name_format": "plain"}, "unsupported", "tensor_name_format"),
        ({"base_gguf_sha256": None}, "key-missing", "base_gguf_sha256"),
        ({"base_gguf_sha256": "xyz"}, "key-value", "base_gguf_sha256"),
        ({"memory_backend": "other"}, "unsupported", "memory_backend"),
        ({"memory_readout_mode": "gated"}, "unsupported", "memory_readout_mode"),
        ({"rwkv_ms_boundary_mode": "sentence"}, "unsupported", "rwkv_ms_boundary_mode"),
        ({"rank": 4}, "disagree", "delta_mem.rank"),
        ({"rank": GgufField(U64, 8)}, "key-type", "delta_mem.rank' has type UINT64"),
        ({"rank": GgufField(ARRAY, [8])}, "key-type", "delta_mem.rank' has type ARRAY"),
        ({"alpha": 8.0}, "disagree", "delta_mem.alpha"),
        ({"alpha": float("nan")}, "key-value", "delta_mem.alpha"),
        ({"rwkv_ms_num_states": 8}, "disagree", "rwkv_ms_num_states"),
        ({"num_state_heads": 2}, "disagree", "num_state_heads"),
        ({"tensor_count": 185}, "disagree", "tensor_count"),
        ({"total_numel": 1}, "disagree", "total_numel"),
        ({"total_bytes": 1}, "disagree", "total_bytes"),
        ({"target_layers_json": "[0,1,2]"}, "disagree", "target_layers"),
        ({"target_layers_json": "[0,1,2,3,5,4]"}, "key-value", "target_layers_json"),
        ({"target_layers_json": "[0,1,2,3,4,5.0]"}, "key-value", "target_layers_json"),
        ({"target_layers_json": "[false,1,2,3,4,5]"}, "key-value", "target_layers_json"),
        ({"target_layers_json": "[0,1,2,3,4,4096]"}, "key-value", "target_layers_json"),
        ({"target_layers_json": "[]"}, "key-value", "target_layers_json"),
        ({"target_layers_json": "[0,"}, "json-invalid", "target_layers_json"),
        ({"target_layers_json": "{}"}, "json-type", "target_layers_json"),
        ({"delta_heads_json": '["q","x"]'}, "key-value", "delta_heads_json"),
        ({"delta_heads_json": '["q","q"]'}, "key-value", "delta_heads_json"),
        ({"delta_heads_json": '["q"]'}, "disagree", "delta_heads"),
        ({"delta_heads_json": "[]"}, "key-value", "delta_heads_json"),
        ({"per_layer_attention_json": "[1]"}, "disagree", "per_layer_attention_json"),
        ({"per_layer_attention_json": "[1,2,3,4,5,6]"}, "attention", "per_layer_attention_json: layer 0"),
        ({"config_json": "[]"}, "json-type", "config_json"),
        ({"config_json": None}, "key-missing", "config_json"),
        ({"tensor_manifest_json": "[]"}, "manifest", "blk.0.beta"),
        ({"tensor_manifest_json": "{}"}, "json-type", "tensor_manifest_json"),
        ({"memory_type": GgufField(U32, 1)}, "key-type", "memory_type"),
        ({"delta_mem.new_feature": GgufField(U32, 1)}, "key-unknown", "delta_mem.new_feature"),
        ({"gemma4.rope": GgufField(U32, 1)}, "key-unknown", "gemma4.rope"),
        ({"delta_mem.\u202e" + "x" * 200: GgufField(U32, 1)}, "key-unknown", "'delta_mem.?" + "x" * 69 + "...'"),
    ],
)
def test_keys_that_are_refused(values: dict[str, Any], reason: str, named: str, exported: Path, tmp_path: Path) -> None:
    error = refusal(edited(read_sidecar(exported), tmp_path / "bad.gguf", values))
    assert error.reason == reason and named in str(error)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        pytest.param('{"rank":8}' + " " * (16 << 20), "json-size", id="17 MB"),
        ("[" * 9, "json-depth"),  # before it is seen that it is no JSON
        ('{"a":' + "[" * 8 + "]" * 8 + "}", "json-depth"),
        ('"' + "[" * 9 + '"', "json-type"),
        ('"\\"' + "[" * 9 + '"', "json-type"),
        ('{"rank":8', "json-invalid"),
        ('{"rank":8}}', "json-invalid"),
        ('{"rank":NaN}', "json-invalid"),
        ('{"rank":-Infinity}', "json-invalid"),
        ('{"rank":1e400}', "json-invalid"),
        ('{"rank":' + "9" * 400 + "}", "json-invalid"),
        ('{"rank":' + "9" * 5000 + "}", "json-invalid"),
        ('{"rank":"\\ud800"}', "json-invalid"),
        ('{"rank":"\\udc00\\ud800"}', "json-invalid"),
        ('{"rank":"\\ud800\\\\udc00"}', "json-invalid"),
        ('{"rank":"\\ud800","rank":8}', "json-invalid"),
        ("\ufeff{}", "json-invalid"),
        ("{}\0", "json-invalid"),
        ("", "json-invalid"),
        ('{"rank":8,"\\u0072ank":8}', "json-duplicate"),
        ('{"rank":8,"rank":8', "json-invalid"),
        ("8", "json-type"),
        ('{"output_init":"\\ud83d\\ude00 \\\\ud800"}', "config-missing"),
        ('{"online_gain":18446744073709551616}', "config-missing"),  # a float
        ('{"online_gain":1e39}', "config-value"),
        ('{"online_gain":true}', "config-value"),
    ],
)
def test_json_that_is_refused(text: str, reason: str, exported: Path, tmp_path: Path) -> None:
    error = refusal(edited(read_sidecar(exported), tmp_path / "bad.gguf", {"config_json": text}))
    assert error.reason == reason and "config_json" in str(error) and len(str(error)) < 400


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("memory_readout_mode", "projected_kv", "config-unsupported"),
        ("memory_readout_mode", 1, "config-value"),
        ("rwkv_ms_boundary_mode", "sentence", "config-unsupported"),
        ("rwkv_ms_write_mode", "gated", "config-unsupported"),
        ("memory_fusion_mode", "gate", "config-unsupported"),
        ("memory_fusion_mode", 1, "config-unsupported"),
        ("memory_fusion_placement", "residual", "config-unsupported"),
        ("memory_write_granularity", "message", "config-unsupported"),
        ("trainable_delta_scale", True, "config-unsupported"),
        ("trainable_delta_scale", 0, "config-unsupported"),
        ("delta_o_rmsnorm", True, "config-unsupported"),
        ("delta_scale_init", True, "config-unsupported"),
        ("rwkv_ms_anchor_capacity", 16, "config-unsupported"),
        ("rwkv_ms_read_top_k", 2, "config-unsupported"),
        ("rwkv_ms_mask_empty_slots", True, "config-unsupported"),
        ("rwkv_ms_read_temperature", 0.5, "config-unsupported"),
        ("num_memory_partitions", 4, "config-unsupported"),
        ("num_memory_partitions", True, "config-unsupported"),
        ("num_memory_partitions", 1.0, "config-unsupported"),
        ("state_update_mode", "other", "config-unsupported"),
        ("couple_lambda", 1, "config-value"),
        ("rankwise_gates", None, "config-value"),
        ("rwkv_ms_erase_gate", "1.0", "config-value"),
        ("rwkv_ms_erase_gate", 1e300, "config-value"),  # infinite in fp32
        ("rwkv_ms_chunk_size", 0, "config-value"),
        ("rwkv_ms_chunk_size", 48.0, "config-value"),
        ("rank", True, "config-value"),
        ("rwkv_ms_state_dtype", "bf16", "config-unsupported"),
        ("rwkv_ms_semantics_version", 3, "config-value"),
        ("something_new", 0, "config-unknown"),
    ],
)
def test_configs_that_are_refused(
    key: str, value: Any, reason: str, exported: Path, model_a: Path, tmp_path: Path
) -> None:
    sidecar = read_sidecar(exported)
    config = config_with(sidecar, **{key: value})
    error = refusal(edited(sidecar, tmp_path / "bad.gguf", config))
    assert error.reason == reason and f"] config_json: {key}" in str(error).replace("unknown member '", "")
    (tmp_path / "delta_mem_config.json").write_text(config["config_json"])
    shutil.copy(model_a / "delta_mem_adapter.pt", tmp_path)
    with pytest.raises(LlamamemError, match=key):
        export_sidecar(tmp_path, model_a / BASE, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_lists_of_the_config_are_compared_with_the_keys(exported: Path, tmp_path: Path) -> None:
    sidecar = read_sidecar(exported)
    for key, value in (("target_layers", [False, True, 2, 3, 4, 5]), ("target_layers", [0]), ("delta_heads", "q")):
        error = refusal(edited(sidecar, tmp_path / "bad.gguf", config_with(sidecar, **{key: value})))
        assert error.reason == "disagree" and key in str(error)
    read_sidecar(edited(sidecar, tmp_path / "x.gguf", config_with(sidecar, target_layers=[0.0, 1, 2, 3, 4, 5])))


def test_keys_of_the_config_that_must_be_there(exported: Path, tmp_path: Path) -> None:
    sidecar = read_sidecar(exported)
    for key in ("rank", "alpha", "rwkv_ms_erase_gate", "state_update_mode", "couple_lambda", "target_layers"):
        error = refusal(edited(sidecar, tmp_path / "bad.gguf", config_with(sidecar, drop=key)))
        assert error.reason == "config-missing" and f"config_json: {key} is missing" in str(error)


def test_sizes_whose_products_are_too_large(exported: Path, tmp_path: Path) -> None:
    sidecar = read_sidecar(exported)
    for sizes in ({"rwkv_ms_chunk_size": 1 << 23}, {"rank": 256, "num_state_heads": 64, "rwkv_ms_num_states": 5}):
        error = refusal(edited(sidecar, tmp_path / "bad.gguf", sizes | config_with(sidecar, **sizes)))
        assert error.reason == "config-value" and "rwkv_ms_num_states" in str(error)


@pytest.mark.parametrize(
    "change",
    [
        {"layer": 1},
        {"layer": False},
        {"layer": 0.0},
        {"attention_kind": "dense"},
        {"attention_kind": None},
        {"q_out": None},
        {"q_out": 0},
        {"q_out": 64.0},
        {"q_out": (1 << 20) + 1},
        {"o_out": 32},  # the hidden size is 64
        {"active_delta_heads": ["q"]},
        {"active_delta_heads": ["q", "o", "k"]},
        {"active_delta_heads": None},
    ],
)
def test_attention_that_is_refused(change: dict[str, Any], exported: Path, tmp_path: Path) -> None:
    sidecar = read_sidecar(exported)
    first, *rest = attention_of(sidecar)
    entries = [first | change, *rest]
    error = refusal(edited(sidecar, tmp_path / "bad.gguf", {"per_layer_attention_json": json.dumps(entries)}))
    assert error.reason == "attention" and "per_layer_attention_json: layer 0" in str(error)


def test_widths_may_be_absent(exported: Path, tmp_path: Path) -> None:
    sidecar = read_sidecar(exported)
    entries = [{k: v for k, v in entry.items() if k not in ("k_out", "v_out")} for entry in attention_of(sidecar)]
    tensors = [t for t in sidecar.tensors.values() if not t.name.endswith(("delta_k", "delta_v"))]
    keys = {"per_layer_attention_json": json.dumps(entries)}
    without = read_sidecar(edited(sidecar, tmp_path / "x.gguf", keys, tensors))
    assert without.layers[0].k_out is None and without.layers[0].v_out is None


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
        ("tensor-missing", "blk.2.mem_v"): good[: at["blk.2.mem_v"]] + good[at["blk.2.mem_v"] + 1 :],
        ("tensor-missing", "blk.0.mem_v"): good[: at["blk.0.mem_v"]] + good[at["blk.0.mem_v"] + 1 :],
        ("tensor-shape", "blk.2.mem_v"): changed("blk.2.mem_v", shape=(64, 8)),
        ("tensor-nonfinite", "blk.2.mem_v"): changed("blk.2.mem_v", data=nan.tobytes()),
        ("tensor-shape", "blk.5.delta_q"): changed("blk.5.delta_q", shape=(64, 16)),
        ("tensor-shape", "blk.5.rwkv.w2"): changed("blk.5.rwkv.w2", shape=(16, 16)),
        ("tensor-unknown", "blk.2.rwkv.new"): [*good, extra],
        ("tensor-unknown", "tensor.11f6ad8ec52a2984"): [*good, other],
        ("tensor-unknown", "blk.9.mem_v"): [*good, replace(matrix, name="blk.9.mem_v")],
        ("tensor-unknown", "blk.2.lambda"): [*good, replace(matrix, name="blk.2.lambda")],
    }
    for (reason, name), tensors in cases.items():
        error = refusal(edited(sidecar, tmp_path / "bad.gguf", {}, tensors))
        assert error.reason == reason and f"tensor '{name}'" in str(error)


def test_a_changed_byte_of_a_tensor_is_noticed(exported: Path, tmp_path: Path) -> None:
    data = bytearray(exported.read_bytes())
    data[-32] ^= 1  # the last tensor has 16 bytes and as many of padding
    (tmp_path / "bad.gguf").write_bytes(data)
    assert refusal(tmp_path / "bad.gguf").reason == "tensor-hash"


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("sha256_raw", "0" * 64, "tensor-hash"),
        ("sha256_raw", None, "manifest"),
        ("shape", [1], "manifest"),
        ("shape", [8.0, 64], "manifest"),
        ("source_name", "x", "manifest"),
        ("source_name", 1, "manifest"),
        ("gguf_type", "F16", "manifest"),
        ("numel", 64.0, "manifest"),
        ("numel", True, "manifest"),
        ("bytes", -1, "manifest"),
        ("name", None, "manifest"),
        ("name", "blk.0.new", "manifest"),
        ("name", "blk.0.beta_b", "manifest"),  # twice
    ],
)
def test_manifest_entries_are_checked(key: str, value: Any, reason: str, exported: Path, tmp_path: Path) -> None:
    sidecar = read_sidecar(exported)
    first, *rest = manifest_of(sidecar)
    assert first["name"] == "blk.0.beta"
    path = edited(sidecar, tmp_path / "bad.gguf", {"tensor_manifest_json": json.dumps([first | {key: value}, *rest])})
    error = refusal(path)
    assert error.reason == reason and ("blk.0" in str(error) or "entry 1 has no name" in str(error))
