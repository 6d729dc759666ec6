"""Whether a base GGUF is the one that a sidecar was made for: docs/sidecar.md, stage 4."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from llamamem.errors import LlamamemError
from llamamem.formats.base import AttentionLayer, BaseModel, base_faults, base_sha256, read_base
from llamamem.formats.findings import Findings
from llamamem.formats.gguf_file import read_gguf_index
from llamamem.formats.sidecar.keys import Said
from llamamem.formats.sidecar.layout import HEADS


def check_base(
    path: Path,
    said: Said,
    hidden: int | None,
    base: Path,
    faults: Findings,
    progress: Callable[[int], None] | None = None,
) -> None:
    """All that speaks against `base` for the sidecar `path`. Raises LlamamemError if it cannot be read."""
    refused = list(base_faults(read_gguf_index(base)))
    if not refused:
        layers = [layer for layer in (said.layers or {}).values() if layer is not None]
        refused += model_faults(read_base(base), hidden, layers, said.delta_heads or ())
    for fault in refused:
        faults.add(fault)
    if said.base_sha256 is not None and all(fault.reason != "base-split" for fault in refused):
        sha256 = base_sha256(base, progress)
        if sha256 != said.base_sha256:
            faults.add(hash_fault(path, said.base_sha256, base, sha256))


def model_faults(
    model: BaseModel, hidden: int | None, layers: Iterable[AttentionLayer], delta_heads: Iterable[str]
) -> Iterator[LlamamemError]:
    """Figures of the base that are not as a sidecar with these target layers and active heads needs them."""
    layers = list(layers)
    if hidden is not None and hidden != model.hidden:
        yield _other(model, f"hidden size is {model.hidden}, the sidecar is for {hidden}")
    for layer in layers:
        if layer.layer >= len(model.layers):
            yield _other(model, f"has {len(model.layers)} layers, but layer {layer.layer} is a target")
            continue
        own = model.layers[layer.layer]
        where = f"layer {layer.layer}"
        if own.attention_kind != layer.attention_kind:
            yield _other(model, f"{where} is {own.attention_kind}, the sidecar says {layer.attention_kind}")
        for head in HEADS:
            want, width = layer.width(head) or 0, own.width(head)
            # of a layer that shares the keys and values of another, a checkpoint may still have widths
            if width is not None and width != want:
                yield _other(model, f"{where}: {head}_out is {width}, the sidecar says {want or 'none'}")
    for layer in layers:
        for head in delta_heads:
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


def _other(model: BaseModel, text: str) -> LlamamemError:
    return LlamamemError(f"{model.path}: {text}", reason="base-shape")
