"""Writes a sidecar from a checkpoint directory and its base."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFValueType

from llamamem.errors import LlamamemError
from llamamem.formats.base import ROWS, AttentionLayer, BaseModel, base_sha256, file_sha256, read_base
from llamamem.formats.checkpoint import METADATA, Checkpoint, read_checkpoint
from llamamem.formats.findings import quoted
from llamamem.formats.gguf_file import ALIGNMENT, GgufField, GgufTensor, read_gguf_index, write_gguf
from llamamem.formats.outputs import check_manifest_target, check_sidecar_target, write_json
from llamamem.formats.sidecar import config as cfg
from llamamem.formats.sidecar.base import Needs, model_faults, needs_of
from llamamem.formats.sidecar.copy import zero_sidecar
from llamamem.formats.sidecar.inspect import inspect_sidecar
from llamamem.formats.sidecar.layout import (
    ARCHITECTURE,
    ARCHITECTURE_3,
    HEADS,
    HF_ROWS,
    MEMORY_KINDS,
    NAME_FORMAT,
    NORM_ROWS,
    PREFIX,
    PREFIX_3,
    RWKV_MS,
    SCHEMA,
    SCHEMA_3,
    SOURCE_PREFIX,
    TYPES,
    TYPES_3,
    Sidecar,
    manifest_entry,
    short_name,
    source_prefix,
)
from llamamem.formats.sidecar.reader import check_sidecar, read_sidecar
from llamamem.formats.sidecar.rows import PERMUTED, to_norm
from llamamem.formats.sidecar.tensor_types import convert

__all__ = ["export_sidecar", "zero_sidecar"]

_F32_MAX = 3.4028234663852886e38


@dataclass(frozen=True)
class _Plan:
    """What is settled before a byte is written: which version of the format, of which kind, in which order of rows."""

    source: Checkpoint
    model: BaseModel
    kind: str
    prefix: str  # of the checkpoint's names
    is_3: bool
    config: dict[str, Any]  # with what absent members mean
    targets: list[Any]
    heads: list[Any]
    rope_head_dim: int  # 0: rows stay as they are


def export_sidecar(
    checkpoint: str | Path,
    base: str | Path,
    output: str | Path,
    *,
    mmproj: str | Path | None = None,
    config: str | None = None,
    checkpoint_repo: str = "",
    dtype: str = "keep",
    manifest: str | Path | None = None,
    row_order: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> Sidecar:
    """Writes a checkpoint directory as a sidecar bound to `base`. The same inputs give the same bytes.

    An RWKV-MS of Gemma 4 becomes a file of format 2, every other memory one of format 3. `row_order` is that of the
    base's q and k, hf or norm: needed where the base's architecture does not tell it.

    What would be refused on load is refused here, before anything is hashed or written. `mmproj` is recorded, no
    more. `config` is another config file: a name inside the directory, or a path. `dtype` is keep, bf16 or f32.
    `manifest` is a JSON file to write besides; `progress` is told the bytes of base and mmproj as they are hashed.
    """
    output = Path(output)
    source = read_checkpoint(checkpoint, config)
    model = read_base(base)
    projector = _check_mmproj(mmproj) if mmproj is not None else None
    _check_targets(output, manifest, [*source.files, model.path, *([projector] if projector else [])])
    plan = _plan(source, model, row_order)
    tensors = _tensors(plan, dtype)
    omitted = {} if plan.kind == RWKV_MS else _omitted(plan, tensors)
    fields = _compose(plan, tensors, omitted, checkpoint_repo)
    plain = {name: tensor for name, (_, tensor) in tensors.items()}
    _check(plan, fields, plain)

    hashes = {"base_gguf_sha256": base_sha256(model.path, progress)}
    if projector is not None:
        hashes |= {"mmproj_gguf": projector.name, "mmproj_gguf_sha256": file_sha256(projector, progress=progress)}
    for key, value in hashes.items():
        key = (PREFIX_3 if plan.is_3 else PREFIX) + key
        fields[key] = replace(fields[key], value=value)
    write_gguf(output, fields, list(plain.values()))
    sidecar = read_sidecar(output)
    if manifest is not None:
        write_json(Path(manifest), inspect_sidecar(output).manifest())
    return sidecar


def _check_mmproj(path: str | Path) -> Path:
    """A projector has both keys today; older ones have the architecture alone."""
    index = read_gguf_index(path)
    if index.get("general.architecture") != "clip" and index.get("general.type") != "mmproj":
        raise LlamamemError(f"{path}: is GGUF, but no multimodal projector; give an mmproj file, or no --mmproj")
    return Path(path)


def _check_targets(output: Path, manifest: str | Path | None, inputs: Iterable[Path]) -> None:
    check_sidecar_target(output, inputs)
    if manifest is None:
        return
    if Path(manifest).resolve() == output.resolve():
        raise LlamamemError(f"{manifest}: is the --output as well; give another --manifest")
    check_manifest_target(Path(manifest), inputs)


def _plan(source: Checkpoint, model: BaseModel, row_order: str | None) -> _Plan:
    where = source.config_path
    kind = cfg.kind_of(source.config)
    if kind is None:
        said = _dumps(source.config["memory_backend"])
        raise LlamamemError(
            f"{where}: [config-unsupported] memory_backend is {said}, only {', '.join(MEMORY_KINDS)} is implemented",
            reason="config-unsupported",
        )
    prefix = source_prefix(source.tensors) or SOURCE_PREFIX
    is_3 = (kind, model.arch, prefix) != (RWKV_MS, "gemma4", SOURCE_PREFIX)
    config = cfg.with_defaults(source.config, kind)
    targets, heads = config.get("target_layers"), config.get("delta_heads")
    if not isinstance(targets, list) or not isinstance(heads, list):
        raise LlamamemError(f"{where}: target_layers and delta_heads must both be lists")
    if is_3 and not targets:
        targets = list(range(len(model.layers)))
    for target in targets:
        if type(target) is not int or not 0 <= target < len(model.layers):
            n = len(model.layers)
            raise LlamamemError(f"{where}: target layer {_dumps(target)} is not one of the {n} of {model.path}")
    order = ROWS.get(model.arch, row_order)
    if order is None:
        raise LlamamemError(
            f"{model.path}: whether its converter permuted the rows of q and k is not known of architecture "
            f"{quoted(model.arch)}; say it with --row-order: norm if it did, for a rope over neighbours, else hf"
        )
    if row_order not in (None, order):
        raise LlamamemError(
            f"{model.path}: rows of q and k are in the order {order}, leave out --row-order {row_order}"
        )
    head_dim = model.head_dim if order == NORM_ROWS else 0
    return _Plan(source, model, kind, prefix, is_3, config, targets, heads, head_dim)


def _tensors(plan: _Plan, dtype: str) -> dict[str, tuple[str, GgufTensor]]:
    """Source names and tensors by name in the file: by layer, then name, whatever the checkpoint's order."""
    source = plan.source
    named = {short_name(name, plan.is_3, plan.prefix): (name, tensor) for name, tensor in source.tensors.items()}
    if len(named) != len(source.tensors):
        raise LlamamemError(f"{source.adapter}: two tensors of the checkpoint have the same name in a sidecar")
    tensors = {}
    for name in sorted(named, key=lambda name: (int(name.split(".")[1]) if name.startswith("blk.") else 1 << 30, name)):
        original, tensor = named[name]
        try:
            converted = tensor if dtype == "keep" else convert(tensor, dtype.upper())
        except LlamamemError as e:
            raise LlamamemError(f"{source.adapter}: {e}") from None
        head_dim = plan.rope_head_dim if name.rpartition(".")[2] in PERMUTED else 0
        # what is no matrix, or of another width, the check of the whole refuses
        if head_dim and len(tensor.shape) == 2 and tensor.shape[0] % head_dim == 0:
            converted = to_norm(converted, head_dim)
        tensors[name] = (original, replace(converted, name=name))
    return tensors


def _omitted(plan: _Plan, tensors: dict[str, tuple[str, GgufTensor]]) -> dict[str, tuple[str, GgufTensor]]:
    """Takes out the zeros that a checkpoint of a delta rule has for heads that are not active."""
    layers = {layer: plan.model.layers[layer] for layer in plan.targets}
    width = plan.config["rank"], plan.config["num_state_heads"]
    omitted = {}
    for layer, attention in layers.items():
        for head in HEADS:
            name = f"blk.{layer}.delta_{head}"
            if head in plan.heads or name not in tensors or not all(type(n) is int for n in width):
                continue
            _, tensor = tensors[name]
            if tensor.shape == (attention.width(head), width[0] * width[1]) and not any(tensor.data):
                omitted[name] = tensors.pop(name)
    return omitted


def _compose(
    plan: _Plan,
    tensors: dict[str, tuple[str, GgufTensor]],
    omitted: dict[str, tuple[str, GgufTensor]],
    checkpoint_repo: str,
) -> dict[str, GgufField]:
    """Keys in the order of the format's description. What is wrong with the config, the check of the whole finds."""
    source, model, config, heads = plan.source, plan.model, plan.config, plan.heads
    layers = tuple(model.layers[target] for target in plan.targets)
    active = tuple(head for head in heads if head in HEADS)
    wanted = Needs(model.arch, None, layers, active, rope_head_dim=plan.rope_head_dim)
    for fault in model_faults(model, wanted):
        text = f"{source.config_path}: [{fault.reason}] {fault}; only q and o are possible"
        raise LlamamemError(text, reason=fault.reason)
    attention = [_attention(layer, heads, tensors | omitted) for layer in layers]
    semantics = config.get("rwkv_ms_semantics_version", 1)
    metadata = None if plan.is_3 and not (source.path / METADATA).exists() else _dumps(source.metadata)
    memory_type = f"delta-mem-{plan.kind.replace('_', '-')}"
    values: dict[str, Any] = {
        "schema": f"{SCHEMA_3}.v3" if plan.is_3 else f"{SCHEMA}.v2",
        "format_version": 3 if plan.is_3 else 2,
        "kind": plan.kind,
        "base_architecture": model.arch,
        "source_prefix": plan.prefix,
        "qk_row_order": NORM_ROWS if plan.rope_head_dim else HF_ROWS,
        "rope_head_dim": plan.rope_head_dim or None,
        "status": "exported",
        "memory_type": _text(source.metadata.get("memory_type") or memory_type),
        "memory_backend": "rwkv_ms",
        "memory_readout_mode": "delta",
        "base_model": _text(source.metadata.get("base_model") or model.name),
        "checkpoint_repo": checkpoint_repo,
        "base_gguf": model.path.name,
        "base_gguf_sha256": "0" * 64,
        "mmproj_gguf": "",
        "mmproj_gguf_sha256": "",
        "tensor_name_format": NAME_FORMAT,
        "rwkv_ms_boundary_mode": "fixed_chunk",
        "rwkv_ms_semantics_version": semantics if type(semantics) is int else 1,
        "rwkv_ms_state_dtype": "f32",
        "tensor_count": len(tensors),
        "rank": config.get("rank"),
        "num_state_heads": config.get("num_state_heads"),
        "rwkv_ms_num_states": config.get("rwkv_ms_num_states"),
        "rwkv_ms_chunk_size": config.get("rwkv_ms_chunk_size"),
        "total_numel": sum(prod(t.shape) for _, t in tensors.values()),
        "total_bytes": sum(len(t.data) for _, t in tensors.values()),
        "alpha": _f32(config.get("alpha")),
        "target_layers_json": _dumps(plan.targets),
        "delta_heads_json": _dumps(heads),
        "per_layer_attention_json": _dumps(attention),
        "config_json": _dumps(source.config),
        "adapter_metadata_json": metadata,
        "required_runtime_hooks_json": _dumps(_hooks(heads)),
        "omitted_tensors_json": _dumps(
            [{"source_name": name, "shape": list(t.shape), "dtype": t.dtype} for name, t in omitted.values()]
        )
        if omitted
        else None,
        "tensor_manifest_json": _dumps([manifest_entry(tensor, name) for name, tensor in tensors.values()]),
    }
    types = TYPES_3[plan.kind] if plan.is_3 else TYPES
    never = {"rope_head_dim", "adapter_metadata_json", "omitted_tensors_json"}
    kept = {k: v for k, v in values.items() if k in types and not (k in never and v is None)}
    architecture = ARCHITECTURE_3 if plan.is_3 else ARCHITECTURE
    fields = _general(architecture, values["base_model"], checkpoint_repo)
    return fields | {(PREFIX_3 if plan.is_3 else PREFIX) + k: GgufField(types[k], v) for k, v in kept.items()}


def _general(architecture: str, base_model: str, checkpoint_repo: str) -> dict[str, GgufField]:
    """What every reader of GGUF shows of a file; a repository has a key there if it is given as an address."""
    texts = {
        "general.name": f"memory for {base_model}",
        "general.description": "A memory adapter, a sidecar of the base model that it names",
    }
    if "://" in checkpoint_repo:
        texts["general.source.repo_url"] = checkpoint_repo
    return {
        "general.architecture": GgufField(GGUFValueType.STRING, architecture),
        "general.alignment": GgufField(GGUFValueType.UINT32, ALIGNMENT),
        **{key: GgufField(GGUFValueType.STRING, text) for key, text in texts.items()},
    }


def _attention(layer: AttentionLayer, heads: list[Any], tensors: dict[str, tuple[str, GgufTensor]]) -> dict[str, Any]:
    """An entry of per_layer_attention_json; heads that have a tensor but are not active are there for compatibility."""
    entry, present = asdict(layer), []
    for head in HEADS:
        tensor = tensors.get(f"blk.{layer.layer}.delta_{head}")
        if tensor is not None:
            present.append(head)
            if entry[f"{head}_out"] is None:
                entry[f"{head}_out"] = tensor[1].shape[0]
    compat = [head for head in present if head not in heads]
    return entry | {"active_delta_heads": heads, "compat_delta_heads": compat}


def _hooks(heads: list[Any]) -> list[str]:
    """What a runtime must be able to do for this memory."""
    places = {
        "q": "delta_q_before_q_norm_and_rope",
        "k": "delta_k_before_k_norm_and_rope",
        "v": "delta_v_before_v_norm",
        "o": "delta_o_before_post_attention_norm",
    }
    active = [places[head] for head in heads if isinstance(head, str) and head in places]
    return ["attention_input_hidden_state", "recurrent_state_per_sequence", *active]


def _check(plan: _Plan, fields: dict[str, GgufField], tensors: dict[str, GgufTensor]) -> None:
    """All that is checked on load, and that the base fits."""
    source = plan.source
    try:
        sidecar = check_sidecar(source.path, fields, tensors)
    except LlamamemError as e:  # what is a key of a sidecar is a file of a checkpoint
        raise LlamamemError(str(e).replace("config_json", source.config_path.name), reason=e.reason) from None
    for fault in model_faults(plan.model, needs_of(sidecar)):
        raise LlamamemError(f"{source.path}: [{fault.reason}] {fault}", reason=fault.reason)


def _dumps(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _f32(value: Any) -> float:
    """The nearest f32, as the key will hold it; 0 for what is none, which the check of the config refuses."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= _F32_MAX:
        return 0.0
    return float(np.float32(value))


def _text(value: Any) -> str:
    """A lone surrogate is legal in JSON and cannot be written as UTF-8."""
    return str(value).encode("utf-8", "replace").decode("utf-8")
