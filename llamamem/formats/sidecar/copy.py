"""Copies of sidecars with one thing changed: the deltas zeroed, or another base. All other bytes stay as they are."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from gguf import GGUFReader

from llamamem.errors import LlamamemError
from llamamem.formats.base import base_sha256
from llamamem.formats.gguf_file import ALIGNMENT, read_gguf_index, replacing
from llamamem.formats.outputs import check_sidecar_target
from llamamem.formats.sidecar import HEADS, Sidecar, manifest_entry, read_sidecar
from llamamem.formats.sidecar.base import base_faults, needs_of


def zero_sidecar(path: str | Path, output: str | Path) -> Sidecar:
    """Writes a copy whose deltas are all zero: with it a model must give the base's output bit for bit."""
    output = Path(output)
    sidecar = read_sidecar(path)
    check_sidecar_target(output, [sidecar.path])
    deltas = {f"delta_{head}" for head in HEADS}
    zeros = {
        name: replace(tensor, data=bytes(len(tensor.data)))
        for name, tensor in sidecar.tensors.items()
        if name.rpartition(".")[2] in deltas
    }
    key = "tensor_manifest_json"
    sources = {entry["name"]: entry["source_name"] for entry in json.loads(sidecar.get(key))}
    manifest = [manifest_entry(tensor, sources[name]) for name, tensor in (sidecar.tensors | zeros).items()]
    text = json.dumps(manifest, separators=(",", ":"), allow_nan=False)
    _copy(sidecar, output, {sidecar.prefix + key: text}, {name: tensor.data for name, tensor in zeros.items()})
    return read_sidecar(output)


def rebind_sidecar(
    path: str | Path, base: str | Path, output: str | Path, progress: Callable[[int], None] | None = None
) -> tuple[Sidecar, list[str]]:
    """Writes a copy bound to another file of the same model, such as another quantisation; returns it with warnings.

    Refuses a base whose figures are not those that the sidecar was made for, before it is hashed. That the weights
    come from the same training cannot be seen from figures. `progress` is told the bytes of the base as they are
    hashed.
    """
    output = Path(output)
    sidecar, index = read_sidecar(path), read_gguf_index(base)
    check_sidecar_target(output, [sidecar.path, index.path])
    if faults := list(base_faults(index, needs_of(sidecar))):
        texts = [str(fault).removeprefix(f"{index.path}: ") for fault in faults]
        raise LlamamemError(
            f"{sidecar.path}: [{faults[0].reason}] {index.path} is another model than the sidecar was made for: "
            + "; ".join(texts),
            reason=faults[0].reason,
        )
    warnings = []
    name, recorded = str(index.get("general.name", "")), sidecar.get("base_model")
    if recorded is not None and recorded != name:
        warnings.append(f"{index.path}: general.name is {name!r}, the sidecar was made for {recorded!r}")
    strings = {f"{sidecar.prefix}base_gguf_sha256": base_sha256(index.path, progress)}
    if sidecar.get("base_gguf") is not None:
        strings[f"{sidecar.prefix}base_gguf"] = index.path.name
    _copy(sidecar, output, strings, {})
    return read_sidecar(output), warnings


def _copy(sidecar: Sidecar, output: Path, strings: Mapping[str, str], tensors: Mapping[str, bytes]) -> None:
    """Writes the file with other values of string keys and other bytes of tensors, of the same lengths."""
    reader = GGUFReader(sidecar.path)
    last = reader.tensors[-1].field
    header_end = int(last.offset) + sum(int(part.nbytes) for part in last.parts)
    raw = bytearray(sidecar.path.read_bytes())
    for tensor in reader.tensors:
        if tensor.name in tensors:
            raw[tensor.data_offset : tensor.data_offset + tensor.n_bytes] = tensors[tensor.name]
    data = raw[reader.data_offset :]
    header = raw[:header_end]
    fields = [field for field in reader.fields.values() if field.name in strings]
    for field in sorted(fields, key=lambda field: -field.offset):  # from the end, so that offsets stay true
        end = field.offset + sum(int(part.nbytes) for part in field.parts)
        value = strings[field.name].encode()
        start = end - len(field.parts[-1]) - 8
        header[start:end] = len(value).to_bytes(8, "little") + value
    header += bytes(-len(header) % ALIGNMENT)
    with replacing(output) as part:
        part.write_bytes(header + data)
