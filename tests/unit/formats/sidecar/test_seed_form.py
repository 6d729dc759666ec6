"""Sidecars of the form that the first exporters write, versions 1 and 2, and ours as their readers read one.

The form is from the published exporters and their file, written down here with GGUFWriter alone: keys in their order,
sorted JSON, absolute paths, tensors in the checkpoint's order, all four deltas of every layer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from llamamem.formats.base import base_sha256, read_base
from llamamem.formats.checkpoint import Checkpoint, read_checkpoint
from llamamem.formats.sidecar import short_name
from llamamem.formats.sidecar.compare import compare
from llamamem.formats.sidecar.export import export_sidecar

TORCH = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def write_seed_form(source: Checkpoint, base: Path, path: Path, version: int) -> Path:
    config = source.config | ({"rwkv_ms_semantics_version": 1} if version == 2 else {})
    tensors = {short_name(name): (name, tensor) for name, tensor in source.tensors.items()}
    manifest = [
        {
            "name": short,
            "source_name": name,
            "shape": list(tensor.shape),
            "torch_dtype": TORCH[tensor.dtype],
            "gguf_type": tensor.dtype,
            "numel": int(np.prod(tensor.shape)),
            "bytes": len(tensor.data),
            "sha256_raw": hashlib.sha256(tensor.data).hexdigest(),
        }
        for short, (name, tensor) in tensors.items()
    ]
    model = read_base(base)

    def rows(layer: int, head: str) -> int:
        return next((e["shape"][0] for e in manifest if e["name"] == f"blk.{layer}.delta_{head}"), 0)

    attention = [
        {
            "layer": layer,
            "attention_kind": model.layers[layer].attention_kind,
            **{f"{head}_out": rows(layer, head) for head in "qkvo"},
            "active_delta_heads": ["q", "o"],
            "compat_delta_heads": ["k", "v"],
        }
        for layer in config["target_layers"]
    ]

    def dumps(value: Any) -> str:
        return json.dumps(value, sort_keys=True, separators=(",", ":"))

    writer = gguf.GGUFWriter(path, "rwkv_ms_memory")
    writer.add_custom_alignment(32)
    writer.add_name("Gemma4 E4B RWKV-MS delta-Mem memory sidecar")
    writer.add_description("RWKV-MS online-memory adapter tensors")
    writer.add_source_repo_url("https://example.org/source")
    p = "delta_mem."
    writer.add_string(f"{p}schema", f"delta_mem_rwkv_ms_memory_gguf_sidecar.v{version}")
    writer.add_string(f"{p}status", "sidecar_only_runtime_port_required")
    writer.add_string(f"{p}memory_type", "delta-mem-rwkv-ms")
    writer.add_string(f"{p}memory_backend", "rwkv_ms")
    writer.add_string(f"{p}memory_readout_mode", "delta")
    writer.add_string(f"{p}base_model", "google/gemma-4-E4B-it")
    writer.add_string(f"{p}checkpoint_repo", "somebody/adapter")
    writer.add_string(f"{p}base_gguf", f"/models/{base.name}")
    writer.add_string(f"{p}base_gguf_sha256", base_sha256(base))
    writer.add_string(f"{p}mmproj_gguf", "/models/mmproj.gguf")
    writer.add_string(f"{p}mmproj_gguf_sha256", "")
    writer.add_string(f"{p}tensor_name_format", "compact_with_source_name_manifest")
    writer.add_uint32(f"{p}format_version", version)
    writer.add_uint32(f"{p}tensor_count", len(manifest))
    writer.add_uint64(f"{p}total_numel", sum(entry["numel"] for entry in manifest))
    writer.add_uint64(f"{p}total_bytes", sum(entry["bytes"] for entry in manifest))
    writer.add_uint32(f"{p}rank", config["rank"])
    writer.add_float32(f"{p}alpha", float(config["alpha"]))
    for name in ("num_state_heads", "rwkv_ms_num_states", "rwkv_ms_chunk_size"):
        writer.add_uint32(p + name, config[name])
    if version == 2:
        writer.add_uint32(f"{p}rwkv_ms_semantics_version", 1)
        writer.add_string(f"{p}rwkv_ms_state_dtype", "f32")
    writer.add_string(f"{p}rwkv_ms_boundary_mode", "fixed_chunk")
    writer.add_string(f"{p}target_layers_json", dumps(config["target_layers"]))
    writer.add_string(f"{p}delta_heads_json", dumps(config["delta_heads"]))
    writer.add_string(f"{p}per_layer_attention_json", dumps(attention))
    writer.add_string(f"{p}config_json", dumps(config))
    writer.add_string(f"{p}adapter_metadata_json", dumps(source.metadata))
    writer.add_string(f"{p}tensor_manifest_json", dumps(manifest))
    writer.add_string(
        f"{p}required_runtime_hooks_json", dumps(["Gemma4 text attention layers 0-5", "q/o delta injection"])
    )
    for short, (_, tensor) in tensors.items():
        raw = np.frombuffer(tensor.data, np.uint8).reshape(*tensor.shape[:-1], -1)
        writer.add_tensor(short, raw, raw_dtype=gguf.GGMLQuantizationType[tensor.dtype])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(params=[1, 2])
def seed_form(request: pytest.FixtureRequest, model_a: Path, tmp_path: Path) -> Path:
    source = read_checkpoint(model_a)
    assert "rwkv_ms_semantics_version" not in source.config  # absent: 1, in their checkpoints as here
    return write_seed_form(source, model_a / "model-f32.gguf", tmp_path / "seed.gguf", request.param)


def test_theirs_is_valid_for_its_base(llamamem: Callable[..., Any], seed_form: Path, model_a: Path) -> None:
    result = llamamem("sidecar", "validate", seed_form, "--base", model_a / "model-f32.gguf")
    assert result.status == 0 and "ok (186 tensors" in result.out


def test_theirs_is_the_same_memory_as_its_checkpoint(
    llamamem: Callable[..., Any], seed_form: Path, model_a: Path, exported: Path
) -> None:
    """What a member of the config means when it is absent, it means when it is said."""
    for other in (model_a, exported):
        result = llamamem("sidecar", "compare", seed_form, other)
        assert result.status == 0 and result.out.startswith("the same memory: 186 tensors"), result.out


def test_theirs_gives_the_checkpoint_back(
    llamamem: Callable[..., Any], seed_form: Path, model_a: Path, tmp_path: Path
) -> None:
    assert llamamem("sidecar", "materialize", seed_form, "--output", tmp_path / "back").status == 0
    back, source = read_checkpoint(tmp_path / "back"), read_checkpoint(model_a)
    assert {name: (t.shape, t.dtype, t.data) for name, t in back.tensors.items()} == {
        name: (t.shape, t.dtype, t.data) for name, t in source.tensors.items()
    }
    assert {**back.config, "rwkv_ms_semantics_version": 1} == {**source.config, "rwkv_ms_semantics_version": 1}
    assert compare(tmp_path / "back", model_a).same


def test_ours_is_what_their_readers_look_at(model_a: Path, tmp_path: Path) -> None:
    """They read with gguf's own reader: each tensor has its manifest entry, by shape, type and hash of its bytes."""
    made = tmp_path / "ours.gguf"
    export_sidecar(model_a, model_a / "model-f32.gguf", made, checkpoint_repo="https://example.org/adapter")
    reader = gguf.GGUFReader(made)

    def text(key: str) -> str:
        return bytes(reader.fields[key].parts[-1]).decode()

    assert text("general.architecture") == "rwkv_ms_memory"
    assert reader.fields["general.alignment"].parts[-1][0] == 32
    assert text("general.name") and text("general.description")
    assert text("general.source.repo_url") == "https://example.org/adapter"
    manifest = {entry["name"]: entry for entry in json.loads(text("delta_mem.tensor_manifest_json"))}
    assert len(manifest) == len(reader.tensors) == 186
    source = read_checkpoint(model_a).tensors
    for tensor in reader.tensors:
        entry = manifest[tensor.name]
        assert entry["shape"] == list(reversed(tensor.shape.tolist()))
        assert (entry["gguf_type"], entry["torch_dtype"]) == (
            tensor.tensor_type.name,
            TORCH[tensor.tensor_type.name],
        )
        assert entry["sha256_raw"] == hashlib.sha256(tensor.data.tobytes()).hexdigest()
        assert entry["sha256_raw"] == hashlib.sha256(source[entry["source_name"]].data).hexdigest()
    assert json.loads(text("delta_mem.config_json")) == read_checkpoint(model_a).config
    for key in ("adapter_metadata_json", "target_layers_json", "delta_heads_json", "per_layer_attention_json"):
        json.loads(text(f"delta_mem.{key}"))


def test_a_real_difference_in_the_config_is_one(llamamem: Callable[..., Any], model_a: Path, tmp_path: Path) -> None:
    made = tmp_path / "two.gguf"
    export_sidecar(model_a, model_a / "model-f32.gguf", made, config="delta_mem_config_v2.json")
    result = llamamem("sidecar", "compare", made, model_a)
    assert result.status == 1 and "rwkv_ms_semantics_version" in result.out
