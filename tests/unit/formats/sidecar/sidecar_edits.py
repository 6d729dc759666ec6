"""Edits of a good sidecar, for the tests of its readers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from llamamem.formats.gguf_file import GgufField, GgufTensor, read_gguf_index, write_gguf
from llamamem.formats.sidecar import PREFIX, TYPES, Sidecar, manifest_entry


def edited(sidecar: Sidecar, path: Path, values: dict[str, Any], tensors: list[GgufTensor] | None = None) -> Path:
    """A copy with other values of keys (without the prefix; None: left out), and a manifest that fits the tensors."""
    fields = dict(sidecar.fields)
    tensors = list(sidecar.tensors.values()) if tensors is None else tensors
    fitting: dict[str, Any] = {
        "tensor_manifest_json": json.dumps([manifest_entry(t, _source(sidecar, t.name)) for t in tensors]),
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


def manifest_of(sidecar: Sidecar) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = json.loads(sidecar.fields[f"{PREFIX}tensor_manifest_json"].value)
    return entries


def attention_of(sidecar: Sidecar) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = json.loads(sidecar.fields[f"{PREFIX}per_layer_attention_json"].value)
    return entries


def config_with(sidecar: Sidecar, drop: str = "", **changes: Any) -> dict[str, Any]:
    config = {k: v for k, v in (sidecar.config | changes).items() if k != drop}
    return {"config_json": json.dumps(config)}


def requantised(model_a: Path, path: Path, without: str = "", **changes: Any) -> Path:
    """The header of model_a's base as another file: other values of keys, and without a tensor. It has no weights."""
    index = read_gguf_index(model_a / "model-f32.gguf")
    writer = gguf.GGUFWriter(path, "gemma4")
    for key, field in index.fields.items():
        name = key.rpartition(".")[2]
        value = changes.get(name, field.value)
        if key != "general.architecture" and value is not None:
            writer.add_key_value(key, value, field.type)
    for info in index.tensors:
        if info.name == without:
            continue
        shape = changes.get("shapes", {}).get(info.name, info.shape)
        writer.add_tensor_info(info.name, shape, np.dtype("float16"), 32, gguf.GGMLQuantizationType.F16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return path


def _source(sidecar: Sidecar, name: str) -> str:
    """The name in the checkpoint, of any layer."""
    first = sidecar.layers[0].layer
    sources = {entry["name"]: entry["source_name"] for entry in manifest_of(sidecar)}
    _, _, layer_and_short = name.partition("blk.")
    layer, _, short = layer_and_short.partition(".")
    return sources.get(f"blk.{first}.{short}", "x").replace(f"layers.{first}.", f"layers.{layer}.")
