"""The tensors of a sidecar against its keys and its manifest, in the order of docs/sidecar.md, stage 3."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any, NamedTuple

import numpy as np

from llamamem.errors import LlamamemError
from llamamem.formats.base import AttentionLayer
from llamamem.formats.findings import Findings, quoted
from llamamem.formats.gguf_file import TYPE_SIZE, GgufTensor
from llamamem.formats.sidecar.keys import Said
from llamamem.formats.sidecar.layout import HEADS, PREFIX, PREFIX_3, RWKV_MS, VECTORS, short_name, values

Shape = tuple[int, ...]

_PIECE = 1 << 20  # values


class _Place(NamedTuple):
    """Where a tensor may be; a size is None where what it depends on was refused."""

    shape: tuple[int | None, ...]
    optional: bool = False
    zero: bool = False  # all of its values must be: nothing reads it


def check_tensors(said: Said, tensors: Mapping[str, GgufTensor], faults: Findings) -> int | None:
    """Checks all tensors; returns the hidden size, None if no tensor gives it."""
    found = {
        "tensor_count": len(tensors),
        "total_numel": sum(prod(t.shape) for t in tensors.values()),
        "total_bytes": sum(len(t.data) for t in tensors.values()),
    }
    for key, count in said.counts.items():
        if count != found[key]:
            prefix = PREFIX_3 if said.is_3 else PREFIX
            text = f"key '{prefix}{key}' is {count}, but the file has {found[key]}"
            faults.add(LlamamemError(text, reason="disagree"))
    manifest = None if said.manifest is None else _read_manifest(said.manifest, tensors, faults)

    first = f"blk.{min(said.layers)}." if said.layers else "?"
    hidden, lora = _columns(tensors, f"{first}mem_v"), _columns(tensors, f"{first}rwkv.w1")
    placed = set()
    for layer, attention in (said.layers or {}).items():
        if attention is not None and hidden is not None and attention.o_out not in (0, hidden):
            text = (
                f"per_layer_attention_json: layer {layer}: o_out is {attention.o_out}, but '{first}mem_v' says {hidden}"
            )
            faults.add(LlamamemError(text, reason="attention"))
        for short, place in sorted(_places(said, attention, hidden, lora).items()):
            name = f"blk.{layer}.{short}"
            placed.add(name)
            if name in tensors:
                _check_tensor(said, tensors[name], place, manifest, faults)
            elif not place.optional:
                faults.add(LlamamemError(f"tensor '{name}' is missing; export it again", reason="tensor-missing"))
    for name in sorted(tensors.keys() - placed):
        if said.layers is None:
            _check_tensor(said, tensors[name], None, manifest, faults)
        else:
            text = f"tensor {quoted(name)} is unknown, or of a layer that is no target: it may change the maths"
            faults.add(LlamamemError(text, reason="tensor-unknown"))
    return hidden


def _columns(tensors: Mapping[str, GgufTensor], name: str) -> int | None:
    return tensors[name].shape[-1] if name in tensors else None


def _places(said: Said, attention: AttentionLayer | None, hidden: int | None, lora: int | None) -> dict[str, _Place]:
    """The tensors of one layer by short name."""
    rank, heads = said.sizes.get("rank"), said.sizes.get("num_state_heads")
    D = None if rank is None or heads is None else rank * heads
    G = {True: D, False: heads, None: None}[said.rankwise_gates]
    is_rwkv_ms = said.kind == RWKV_MS
    places = {
        "mem_v": _Place((D, hidden)),
        "mem_q": _Place((D, hidden), optional=is_rwkv_ms),  # there of other kinds
        "mem_k": _Place((D, hidden), optional=is_rwkv_ms),
        "beta": _Place((G, hidden)),
        "beta_b": _Place((G,)),
    }
    if not said.couple_lambda:
        unknown = said.couple_lambda is None
        places |= {"lambda": _Place((G, hidden), unknown), "lambda_b": _Place((G,), unknown)}
    places |= _core_places(D, lora) if is_rwkv_ms else _delta_places(said, attention)
    active = said.delta_heads or ()
    for head in HEADS:
        if attention is None:
            places[f"delta_{head}"] = _Place((None, D), optional=True)
        elif width := attention.width(head):
            idle = head not in active
            places[f"delta_{head}"] = _Place((width, D), optional=idle, zero=idle and not is_rwkv_ms)
    return places


def _core_places(D: int | None, lora: int | None) -> dict[str, _Place]:
    """Of an RWKV-MS: its core."""
    places = {f"rwkv.{x}": _Place((D,)) for x in VECTORS}
    places |= {f"rwkv.{x}.weight": _Place((D, D)) for x in ("receptance", "key", "value", "output")}
    for x in "wag":
        places |= {f"rwkv.{x}1": _Place((D, lora)), f"rwkv.{x}2": _Place((lora, D))}
    return places


def _delta_places(said: Said, attention: AttentionLayer | None) -> dict[str, _Place]:
    """Of a delta rule: what its deltas are scaled and normed with."""
    places = {}
    if said.scaled is not False:
        size = {"layer": 1, "head": len(HEADS), None: None}[said.scale_granularity]
        places["delta_scale"] = _Place((size,), optional=said.scaled is None)
    if said.o_norm is not False and (attention is None or attention.o_out):
        needed = said.o_norm is True and said.delta_heads is not None and "o" in said.delta_heads
        width = None if attention is None else attention.o_out
        places["delta_o_norm"] = _Place((width,), optional=attention is None or not needed)
    return places


def _read_manifest(entries: list[Any], tensors: Mapping[str, GgufTensor], faults: Findings) -> dict[str, Any]:
    """The entries by name."""
    manifest: dict[str, Any] = {}
    for i, entry in enumerate(entries, 1):
        name = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(name, str):
            fault = f"entry {i} has no name"
        elif name not in tensors:
            fault = f"{quoted(name)} is no tensor of the file"
        elif name in manifest:
            fault = f"tensor {quoted(name)} is there twice"
        else:
            manifest[name] = entry
            continue
        faults.add(LlamamemError(f"tensor_manifest_json: {fault}", reason="manifest"))
    return manifest


def _check_tensor(
    said: Said, tensor: GgufTensor, place: _Place | None, manifest: dict[str, Any] | None, faults: Findings
) -> None:
    if place is not None:
        faults.attempt(_check_shape, tensor, place.shape, exact=said.is_3)
    if manifest is not None:
        faults.attempt(_check_entry, said, tensor, manifest.get(tensor.name))
        faults.attempt(_check_hash, tensor, manifest.get(tensor.name))
    faults.attempt(_check_values, tensor)
    if place is not None and place.zero:
        faults.attempt(_check_zero, tensor)


def _check_shape(tensor: GgufTensor, want: tuple[int | None, ...], exact: bool) -> None:
    """The files of versions 1 and 2 that there are may lack leading ones; where they are more, nothing is broadcast."""
    known = tuple(n for n in want if n is not None)
    same = tensor.shape == known if exact else _plain(tensor.shape) == _plain(known)
    if len(known) == len(want) and not same:
        text = f"tensor {quoted(tensor.name)} has shape {list(tensor.shape)}, must be {list(known)}"
        raise LlamamemError(text, reason="tensor-shape")


def _check_entry(said: Said, tensor: GgufTensor, entry: dict[str, Any] | None) -> None:
    where = f"tensor_manifest_json: tensor {quoted(tensor.name)}"
    if entry is None:
        raise LlamamemError(f"{where} has no entry", reason="manifest")
    source, kind, shape = entry.get("source_name"), entry.get("gguf_type"), entry.get("shape")
    as_said = {
        "source_name": isinstance(source, str)
        and (said.source_prefix is None or short_name(source, said.is_3, said.source_prefix) == tensor.name),
        "shape": isinstance(shape, list)
        and all(type(n) is int for n in shape)
        and _plain(tuple(shape)) == _plain(tensor.shape),
        # the type's name may stand behind that of its enum
        "gguf_type": isinstance(kind, str) and kind.rpartition(".")[2].upper() == tensor.dtype,
        "numel": type(entry.get("numel")) is int and entry["numel"] == prod(tensor.shape),
        "bytes": type(entry.get("bytes")) is int and entry["bytes"] == len(tensor.data),
        "sha256_raw": isinstance(entry.get("sha256_raw"), str),
    }
    for key, right in as_said.items():
        if not right:
            raise LlamamemError(f"{where}: {key} is not that of the tensor", reason="manifest")


def _check_hash(tensor: GgufTensor, entry: dict[str, Any] | None) -> None:
    said = None if entry is None else entry.get("sha256_raw")
    if isinstance(said, str) and said != (sha := hashlib.sha256(tensor.data).hexdigest()):
        text = f"tensor {quoted(tensor.name)} has SHA-256 {sha}, the manifest says {quoted(said)}; copy the file again"
        raise LlamamemError(text, reason="tensor-hash")


def _check_values(tensor: GgufTensor) -> None:
    """In pieces, as a tensor of a hostile file may be as large as the file, and twice that in fp32."""
    size = TYPE_SIZE[tensor.dtype]
    for start in range(0, len(tensor.data), _PIECE * size):
        data = tensor.data[start : start + _PIECE * size]
        finite = np.isfinite(values(replace(tensor, data=data, shape=(len(data) // size,))))
        if not finite.all():
            at = start // size + int(np.argmin(finite))
            text = f"tensor {quoted(tensor.name)} holds NaN or infinity, first at value {at}"
            raise LlamamemError(text, reason="tensor-nonfinite")


def _check_zero(tensor: GgufTensor) -> None:
    if any(tensor.data) and np.any(values(tensor)):
        text = (
            f"tensor {quoted(tensor.name)} is not zero, but delta head {tensor.name[-1]} is not active: "
            "make it active, or leave the tensor out"
        )
        raise LlamamemError(text, reason="tensor-inactive")


def _plain(shape: Shape) -> Shape:
    """Without leading ones, which some writers of GGUF leave out."""
    ones = next((i for i, n in enumerate(shape[:-1]) if n != 1), max(len(shape) - 1, 0))
    return shape[ones:]
