"""What is in a sidecar file, for people and for machines: as much as can be read, even of a damaged one."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from llamamem.errors import LlamamemError
from llamamem.formats.base import file_sha256
from llamamem.formats.findings import Finding
from llamamem.formats.gguf_file import TYPE_SIZE, GgufField, GgufTensor, read_gguf, read_gguf_index
from llamamem.formats.sidecar import ARCHITECTURES, HEADS, PREFIX, validate_sidecar, values
from llamamem.formats.sidecar.layout import ARCHITECTURE_3, PREFIX_3

_LABEL, _WIDTH = 13, 66  # characters of a label and of a value: the summary is for screens of 80 columns
_MOST_ROWS = 4  # of layers with other widths


@dataclass(frozen=True)
class TensorRow:
    """A tensor of the file; `shape` is torch's, `abs_max` the largest absolute value, None if it cannot be read."""

    name: str
    shape: tuple[int, ...]
    type: str
    bytes: int
    abs_max: float | None


@dataclass(frozen=True)
class Inspection:
    """A file as it is. `findings` is empty if it is intact; `metadata` has the keys `*_json` parsed where that goes."""

    path: Path
    bytes: int
    sha256: str
    findings: tuple[Finding, ...]
    metadata: dict[str, Any]
    tensors: tuple[TensorRow, ...]

    @property
    def intact(self) -> bool:
        """No rule of docs/sidecar.md is broken."""
        return not self.findings

    def manifest(self) -> dict[str, Any]:
        """The file on record: its name, size and hash, all metadata, and the tensor manifest."""
        key = f"{self._prefix}tensor_manifest_json"
        return {
            "sidecar": self.path.name,
            "bytes": self.bytes,
            "sha256": self.sha256,
            "metadata": {k: v for k, v in self.metadata.items() if k != key},
            "tensors": self.metadata.get(key),
        }

    def as_json(self) -> dict[str, Any]:
        """Everything, for machines; numbers that are not finite are strings."""
        return {
            "path": str(self.path),
            "bytes": self.bytes,
            "sha256": self.sha256,
            "ok": self.intact,
            "findings": [asdict(finding) for finding in self.findings],
            "metadata": self.metadata,
            "tensors": [asdict(row) | {"abs_max": _finite(row.abs_max)} for row in self.tensors],
        }

    def summary(self) -> list[tuple[str, str]]:
        """Labels and values, each for one line of a screen of 80 columns; what is not in the file is left out."""
        get = self._get
        numel, n_bytes = sum(prod(row.shape) for row in self.tensors), sum(row.bytes for row in self.tensors)
        types = " ".join(sorted({row.type for row in self.tensors}))
        n_layers = len({row.name.split(".")[1] for row in self.tensors if row.name.startswith("blk.")}) or 1
        each = f", {len(self.tensors) // n_layers} a layer" if len(self.tensors) % n_layers == 0 else ""
        rows = [
            ("memory for", get("base_model")),
            ("architecture", get("base_architecture")),
            ("base GGUF", get("base_gguf")),
            ("  sha256", get("base_gguf_sha256")),
            ("mmproj", get("mmproj_gguf")),
            ("  sha256", get("mmproj_gguf_sha256")),
            ("checkpoint", get("checkpoint_repo")),
            *self._layers(),
            ("delta heads", self._heads()),
            *self._memory(),
            ("tensors", f"{len(self.tensors)} {types}{each}"),
            ("  rows", self._rows()),
            ("  parameters", f"{numel:,} in {n_bytes:,} bytes"),
            ("format", f"version {get('format_version')}, {get('schema')}"),
            ("file", f"{self.bytes:,} bytes"),
            ("  sha256", self.sha256),
        ]
        return [(printable(label, _LABEL), printable(text)) for label, text in rows if text]

    @property
    def _prefix(self) -> str:
        return PREFIX_3 if self.metadata.get("general.architecture") == ARCHITECTURE_3 else PREFIX

    def _memory(self) -> list[tuple[str, str]]:
        """What the maths is, in two or three rows."""
        get = self._get
        kind = get("kind") or get("memory_backend")
        what = f"{kind}, rank {get('rank')}, alpha {get('alpha')}, state heads {get('num_state_heads')}"
        if kind == "delta_rule":
            return [("memory", what), ("  update", self._update_mode())]
        chunk = f"{get('rwkv_ms_chunk_size')} tokens, {get('rwkv_ms_boundary_mode')}"
        semantics = f"version {get('rwkv_ms_semantics_version') or 1}, {self._update_mode()} update"
        what += f", states {get('rwkv_ms_num_states')}"
        return [("memory", what), ("  chunk", chunk), ("  semantics", semantics)]

    def _rows(self) -> str:
        order, width = self._get("qk_row_order"), self._get("rope_head_dim")
        return f"of delta_q and delta_k permuted in heads of {width}" if order == "norm" else ""

    def _get(self, key: str) -> str:
        value = self.metadata.get(self._prefix + key)
        return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)

    def _update_mode(self) -> str:
        config = self.metadata.get(f"{self._prefix}config_json")
        return str(config.get("state_update_mode", "standard")) if isinstance(config, dict) else "?"

    def _layers(self) -> list[tuple[str, str]]:
        """The target layers, and a row for each run of layers with the same attention."""
        entries = self.metadata.get(f"{self._prefix}per_layer_attention_json")
        targets = self.metadata.get(f"{self._prefix}target_layers_json")
        rows = [("layers", spans(targets))] if isinstance(targets, list) else []
        known = [e for e in entries if isinstance(e, dict)] if isinstance(entries, list) else []
        runs = [list(run) for _, run in groupby(known, _attention)]
        for run in runs[:_MOST_ROWS]:
            kind, widths = _attention(run[0])
            rows.append((f"  {kind}", f"{spans(entry.get('layer') for entry in run)}: {widths}"))
        return [*rows, ("  ...", f"{len(runs) - _MOST_ROWS} more")] if len(runs) > _MOST_ROWS else rows

    def _heads(self) -> str:
        heads = self.metadata.get(f"{self._prefix}delta_heads_json")
        if not isinstance(heads, list):
            return ""
        there = {row.name.rpartition(".delta_")[2] for row in self.tensors if ".delta_" in row.name}
        idle = [head for head in HEADS if head in there and head not in heads]
        return " ".join(map(str, heads)) + (f" ({' '.join(idle)}: in the file, not used)" if idle else "")


def inspect_sidecar(path: str | Path) -> Inspection:
    """Reads what can be read of a file and checks all of it. Raises LlamamemError if there is nothing to read."""
    path = Path(path)
    findings = validate_sidecar(path).findings
    fields, rows = _contents(path)
    if not any(key.startswith((PREFIX, PREFIX_3)) for key in fields) and findings:
        first = findings[0]
        raise LlamamemError(f"{path}: [{first.reason}] {first.message}", reason=first.reason)
    return Inspection(
        path,
        bytes=path.stat().st_size,
        sha256=file_sha256(path),
        findings=findings,
        metadata={key: _parsed(key, field) for key, field in fields.items()},
        tensors=tuple(rows),
    )


def spans(numbers: Iterable[Any]) -> str:
    """`[0, 1, 2, 5]` as `0-2 5`."""
    runs: list[list[Any]] = []
    for n in numbers:
        if runs and type(n) is int and n - 1 == runs[-1][-1]:
            runs[-1] = [runs[-1][0], n]
        else:
            runs.append([n])
    return " ".join("-".join(map(str, run)) for run in runs)


def printable(text: str, width: int = _WIDTH) -> str:
    """Untrusted text for a terminal: no control characters, and cut to `width`."""
    short = text if len(text) <= width else text[: width - 3] + "..."
    return "".join(c if c.isprintable() else "?" for c in short)


def _attention(entry: dict[str, Any]) -> tuple[str, str]:
    """The kind, in short, and the widths."""
    widths = ", ".join(f"{head} {entry[f'{head}_out']}" for head in HEADS if entry.get(f"{head}_out") is not None)
    return str(entry.get("attention_kind")).removesuffix("_attention"), widths


def _contents(path: Path) -> tuple[Mapping[str, GgufField], list[TensorRow]]:
    """Keys and tensors; of a file that is cut short, what its header says of them; of any other, nothing."""
    try:
        fields, tensors = read_gguf(path, ARCHITECTURES)
        return fields, [_row(tensor) for tensor in tensors.values()]
    except LlamamemError:
        pass
    try:
        index = read_gguf_index(path)
    except LlamamemError:
        return {}, []
    return index.fields, [
        TensorRow(info.name, info.shape, info.type.name, prod(info.shape) * TYPE_SIZE.get(info.type.name, 0), None)
        for info in index.tensors
    ]


def _row(tensor: GgufTensor) -> TensorRow:
    largest = np.abs(values(tensor)).max()  # NaN if there is one
    return TensorRow(tensor.name, tensor.shape, tensor.dtype, len(tensor.data), float(largest))


def _parsed(key: str, field: GgufField) -> Any:
    value = _finite(field.value)
    if not key.endswith("_json") or not isinstance(value, str):
        return value
    try:
        return json.loads(value, parse_constant=str, parse_float=lambda text: _finite(float(text)))
    except (ValueError, RecursionError):
        return value


def _finite(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
