"""Whether a base GGUF is the one that a sidecar was made for: docs/sidecar.md, stage 4."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from llamamem.errors import LlamamemError
from llamamem.formats.base import ROWS, AttentionLayer, BaseModel, base_files, base_sha256, read_base
from llamamem.formats.findings import Findings, quoted
from llamamem.formats.gguf_file import GgufIndex, read_gguf_index
from llamamem.formats.sidecar.keys import Said
from llamamem.formats.sidecar.layout import HEADS, HF_ROWS, NORM_ROWS, Sidecar


@dataclass(frozen=True)
class Needs:
    """What a sidecar needs of its base; None where that was refused. Made of a sidecar, or of the keys of one."""

    arch: str | None
    hidden: int | None
    layers: tuple[AttentionLayer, ...]
    delta_heads: tuple[str, ...]
    every_layer: bool = False  # there must be no more layers than those
    rope_head_dim: int | None = 0  # 0: rows of q and k as in the checkpoint
    kinds_matter: bool = True  # of attention: in versions 1 and 2


def needs_of(sidecar: Sidecar) -> Needs:
    """What a valid sidecar needs."""
    return Needs(
        arch=sidecar.base_arch,
        hidden=sidecar.hidden,
        layers=sidecar.layers,
        delta_heads=sidecar.delta_heads,
        every_layer=sidecar.format_version == 3 and sidecar.config.get("target_layers", []) == [],
        rope_head_dim=sidecar.rope_head_dim,
        kinds_matter=sidecar.format_version < 3,
    )


def check_base(
    path: Path,
    said: Said,
    hidden: int | None,
    base: Path,
    faults: Findings,
    progress: Callable[[int], None] | None = None,
) -> None:
    """All that speaks against `base` for the sidecar `path`. Raises LlamamemError if it cannot be read."""
    layers = tuple(layer for layer in (said.layers or {}).values() if layer is not None)
    heads = tuple(said.delta_heads or ())
    needs = Needs(said.base_arch, hidden, layers, heads, said.every_layer, said.rope_head_dim, not said.is_3)
    refused = list(base_faults(read_gguf_index(base), needs))
    for fault in refused:
        faults.add(fault)
    if said.base_sha256 is not None and all(fault.reason != "base-split" for fault in refused):
        sha256 = base_sha256(base, progress)
        if sha256 != said.base_sha256:
            faults.add(hash_fault(path, said.base_sha256, base, sha256))


def base_faults(index: GgufIndex, needs: Needs) -> Iterator[LlamamemError]:
    """All that speaks against a base but its hash; only headers are read. Raises LlamamemError if they are damaged."""
    found = list(_file_faults(index, needs))
    yield from found
    if not found:
        yield from model_faults(read_base(index.path), needs)


def model_faults(model: BaseModel, needs: Needs) -> Iterator[LlamamemError]:
    """Figures of the base that are not as a sidecar needs them."""
    if needs.hidden is not None and needs.hidden != model.hidden:
        yield _other(model, f"hidden size is {model.hidden}, the sidecar is for {needs.hidden}")
    for layer in needs.layers:
        if layer.layer >= len(model.layers):
            yield _other(model, f"has {len(model.layers)} layers, but layer {layer.layer} is a target")
            continue
        own = model.layers[layer.layer]
        where = f"layer {layer.layer}"
        if needs.kinds_matter and own.attention_kind != layer.attention_kind:
            yield _other(model, f"{where} is {own.attention_kind}, the sidecar says {layer.attention_kind}")
        for head in HEADS:
            want, width = layer.width(head) or 0, own.width(head)
            # of a layer that shares the keys and values of another, a checkpoint may still have widths
            if width is not None and width != want:
                yield _other(model, f"{where}: {head}_out is {width}, the sidecar says {want or 'none'}")
    if needs.every_layer and needs.layers and len(needs.layers) < len(model.layers):
        yield _other(model, f"has {len(model.layers)} layers, the sidecar is for all of {len(needs.layers)}")
    if needs.rope_head_dim is not None and needs.arch == model.arch:
        yield from _row_faults(model, needs.rope_head_dim)
    for layer in needs.layers:
        for head in needs.delta_heads:
            if head in "kv" and layer.layer < len(model.layers):
                if model.layers[layer.layer].width(head) is None:
                    lacks = "shares the keys and values of an earlier layer"
                elif layer.layer in model.values_are_keys:
                    lacks = "has no v projection: its values are its keys"
                else:
                    continue
                text = f"{model.path}: delta head {head} is active on layer {layer.layer}, which {lacks}"
                yield LlamamemError(text, reason="base-heads")


def hash_fault(path: Path, said: str, base: Path, sha256: str) -> LlamamemError:
    """That `base` is another file than the one whose SHA-256 the sidecar `path` has."""
    return LlamamemError(
        f"base {base} has SHA-256 {sha256}, but sidecar {path} is bound to {said}; "
        "give the base that the sidecar was made for, or, for another quantisation of that model, a sidecar that "
        "`llamamem sidecar rebind` bound to it",
        reason="base-hash",
    )


def _file_faults(index: GgufIndex, needs: Needs) -> Iterator[LlamamemError]:
    arch = str(index.get("general.architecture"))
    if needs.arch is not None and arch != needs.arch:
        text = f"{index.path}: architecture is {quoted(arch)}, the sidecar is for {quoted(needs.arch)}"
        yield LlamamemError(text, reason="base-architecture")
    try:
        base_files(index)
    except LlamamemError as fault:
        yield fault


def _row_faults(model: BaseModel, rope_head_dim: int) -> Iterator[LlamamemError]:
    """Of an architecture whose row order is not known, the exporter was told it."""
    order = NORM_ROWS if rope_head_dim else HF_ROWS
    if ROWS.get(model.arch, order) != order:
        text = f"rows of q and k are in the order '{ROWS[model.arch]}' in {model.arch}, the sidecar says '{order}'"
        yield LlamamemError(f"{model.path}: {text}; export it again", reason="base-rows")
    elif rope_head_dim and rope_head_dim != model.head_dim:
        text = f"a head of q has {model.head_dim} rows, the sidecar's rows are permuted in heads of {rope_head_dim}"
        yield LlamamemError(f"{model.path}: {text}; export it again", reason="base-rows")


def _other(model: BaseModel, text: str) -> LlamamemError:
    return LlamamemError(f"{model.path}: {text}", reason="base-shape")
