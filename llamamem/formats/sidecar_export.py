"""Writes sidecars: from a checkpoint and its base, and copies with the deltas zeroed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from math import prod
from pathlib import Path
from typing import Any

from llamamem.errors import LlamamemError
from llamamem.formats import sidecar_config as cfg
from llamamem.formats.base import AttentionLayer, BaseModel, file_sha256, read_base
from llamamem.formats.checkpoint import Checkpoint, read_checkpoint
from llamamem.formats.gguf_file import GgufField, GgufTensor, write_gguf
from llamamem.formats.sidecar import (
    ARCHITECTURE,
    HEADS,
    NAME_FORMAT,
    PREFIX,
    SCHEMA,
    TYPES,
    Sidecar,
    check_sidecar,
    manifest_entry,
    read_sidecar,
    short_name,
)


def export_sidecar(
    checkpoint: str | Path,
    base: str | Path,
    output: str | Path,
    *,
    config: str | None = None,
    checkpoint_repo: str = "",
    progress: Callable[[int], None] | None = None,
) -> Sidecar:
    """Writes a checkpoint directory as a sidecar of format 2, bound to `base`. The same inputs give the same bytes.

    What would be refused on load is refused here, before anything is written. `config` names another config file in
    the directory; `progress` is told the bytes of the base as they are hashed.
    """
    output = Path(output)
    source = read_checkpoint(checkpoint, config)
    model = read_base(base)
    _refuse_overwriting(output, model.path)
    fields, tensors = _compose(source, model, checkpoint_repo, base_sha256="0" * 64)
    _check_base(check_sidecar(source.path, fields, tensors), source, model)  # before hashing: a base has gigabytes
    fields[f"{PREFIX}base_gguf_sha256"] = replace(
        fields[f"{PREFIX}base_gguf_sha256"], value=file_sha256(model.path, progress)
    )
    write_gguf(output, fields, list(tensors.values()))
    return read_sidecar(output)


def zero_sidecar(path: str | Path, output: str | Path) -> Sidecar:
    """Writes a copy whose deltas are all zero: with it a model must give the base's output bit for bit."""
    output = Path(output)
    sidecar = read_sidecar(path)
    _refuse_overwriting(output, sidecar.path)
    tensors = [
        replace(t, data=bytes(len(t.data))) if t.name.rpartition(".")[2] in {f"delta_{head}" for head in HEADS} else t
        for t in sidecar.tensors.values()
    ]
    key = f"{PREFIX}tensor_manifest_json"
    sources = {entry["name"]: entry["source_name"] for entry in json.loads(sidecar.fields[key].value)}
    manifest = [manifest_entry(tensor, sources[tensor.name]) for tensor in tensors]
    fields = sidecar.fields | {key: replace(sidecar.fields[key], value=_dumps(manifest))}
    write_gguf(output, fields, tensors)
    return read_sidecar(output)


def _compose(
    source: Checkpoint, model: BaseModel, checkpoint_repo: str, base_sha256: str
) -> tuple[dict[str, GgufField], dict[str, GgufTensor]]:
    """Keys in the order of the format's description; tensors by layer, then name, whatever the checkpoint's order."""
    where, config = str(source.config_path), source.config
    cfg.check_config(where, config)
    named = {short_name(t.name): t for t in source.tensors.values()}
    if len(named) != len(source.tensors):
        raise LlamamemError(f"{source.path}: two tensors of the checkpoint have the same name in a sidecar")
    order = sorted(named, key=lambda name: (int(name.split(".")[1]) if name.startswith("blk.") else 1 << 30, name))
    tensors = {name: GgufTensor(name, named[name].dtype, named[name].shape, named[name].data) for name in order}
    targets, heads = config.get("target_layers"), config.get("delta_heads")
    if not isinstance(targets, list) or not isinstance(heads, list):
        raise LlamamemError(f"{where}: target_layers and delta_heads must both be lists")
    outside = [t for t in targets if type(t) is not int or not 0 <= t < len(model.layers)]
    if outside:
        raise LlamamemError(f"{where}: target layer {outside[0]} is not one of the {len(model.layers)} of {model.path}")
    attention = [_attention(where, model.layers[t], heads, tensors) for t in targets]
    version = "rwkv_ms_semantics_version"
    values: dict[str, Any] = {
        "schema": f"{SCHEMA}.v2",
        "format_version": 2,
        "status": "exported",
        "memory_type": _text(source.metadata.get("memory_type") or "delta-mem-rwkv-ms"),
        "memory_backend": cfg.choice(where, config, "memory_backend", ("rwkv_ms",)),
        "memory_readout_mode": cfg.choice(where, config, "memory_readout_mode", ("delta",)),
        "base_model": _text(source.metadata.get("base_model") or model.name),
        "checkpoint_repo": checkpoint_repo,
        "base_gguf": model.path.name,
        "base_gguf_sha256": base_sha256,
        "mmproj_gguf": "",
        "mmproj_gguf_sha256": "",
        "tensor_name_format": NAME_FORMAT,
        "rwkv_ms_boundary_mode": cfg.choice(where, config, "rwkv_ms_boundary_mode", ("fixed_chunk",)),
        "rwkv_ms_semantics_version": cfg.integer(where, {version: 1} | config, version, 1, 2),
        "rwkv_ms_state_dtype": "f32",
        "tensor_count": len(tensors),
        "rank": cfg.integer(where, config, "rank", 1, 256),
        "num_state_heads": cfg.integer(where, config, "num_state_heads", 1, 64),
        "rwkv_ms_num_states": cfg.integer(where, config, "rwkv_ms_num_states", 1, 1024),
        "rwkv_ms_chunk_size": cfg.integer(where, config, "rwkv_ms_chunk_size", 1, 1 << 24),
        "total_numel": sum(prod(t.shape) for t in tensors.values()),
        "total_bytes": sum(len(t.data) for t in tensors.values()),
        "alpha": cfg.number(where, config, "alpha"),
        "target_layers_json": _dumps(targets),
        "delta_heads_json": _dumps(heads),
        "per_layer_attention_json": _dumps(attention),
        "config_json": _dumps(config),
        "adapter_metadata_json": _dumps(source.metadata),
        "required_runtime_hooks_json": _dumps(_hooks(heads)),
        "tensor_manifest_json": _dumps([manifest_entry(tensors[n], named[n].name) for n in order]),
    }
    fields = {"general.architecture": GgufField(TYPES["schema"], ARCHITECTURE)}
    return fields | {PREFIX + key: GgufField(TYPES[key], value) for key, value in values.items()}, tensors


def _attention(where: str, layer: AttentionLayer, heads: list[str], tensors: dict[str, GgufTensor]) -> dict[str, Any]:
    """An entry of per_layer_attention_json; heads that have a tensor but are not active are there for compatibility."""
    entry, present = asdict(layer), []
    for head in HEADS:
        tensor = tensors.get(f"blk.{layer.layer}.delta_{head}")
        if entry[f"{head}_out"] is None and head in heads:
            raise LlamamemError(
                f"{where}: delta head {head} is active on layer {layer.layer}, which shares the keys and values of an "
                "earlier layer; only q and o are possible there"
            )
        if tensor is not None:
            present.append(head)
            if entry[f"{head}_out"] is None:
                entry[f"{head}_out"] = tensor.shape[0]
    compat = [head for head in present if head not in heads]
    return entry | {"active_delta_heads": heads, "compat_delta_heads": compat}


def _hooks(heads: list[str]) -> list[str]:
    """What a runtime must be able to do for this memory."""
    places = {
        "q": "delta_q_before_q_norm_and_rope",
        "k": "delta_k_before_k_norm_and_rope",
        "v": "delta_v_before_v_norm",
        "o": "delta_o_before_post_attention_norm",
    }
    return ["attention_input_hidden_state", "recurrent_state_per_sequence", *(places[h] for h in heads if h in places)]


def _check_base(sidecar: Sidecar, source: Checkpoint, model: BaseModel) -> None:
    if sidecar.hidden != model.hidden:
        raise LlamamemError(
            f"{source.path}: was made for a hidden size of {sidecar.hidden}, {model.path} has {model.hidden}; "
            "give the base that it was trained on"
        )


def _refuse_overwriting(output: Path, source: Path) -> None:
    if output.exists() and output.samefile(source):
        raise LlamamemError(f"{output}: is the input itself; give another --output")


def _dumps(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _text(value: Any) -> str:
    """A lone surrogate is legal in JSON and cannot be written as UTF-8."""
    return str(value).encode("utf-8", "replace").decode("utf-8")
