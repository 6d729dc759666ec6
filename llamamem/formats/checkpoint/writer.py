"""Writes checkpoint directories: the way back from a sidecar, without torch."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from llamamem.errors import LlamamemError
from llamamem.formats.checkpoint.reader import ADAPTER, CONFIG, METADATA
from llamamem.formats.checkpoint.torch_pickle import torch_pickle
from llamamem.formats.gguf_file import TYPE_SIZE, GgufTensor, replacing
from llamamem.formats.json_text import parse_json
from llamamem.formats.sidecar import HEADS, Sidecar
from llamamem.formats.sidecar.rows import PERMUTED, to_hf

FORMATS = ("pt", "safetensors")

_PAGE = 64  # bytes; torch.save starts a storage at a multiple of it


def write_checkpoint(
    folder: str | Path,
    tensors: Iterable[GgufTensor],
    config: Mapping[str, Any],
    metadata: Mapping[str, Any] | None,
    *,
    format: str = "pt",
    force: bool = False,
) -> list[Path]:
    """Writes the files of a checkpoint and returns their paths; without metadata (delta-mem) there is no such file.

    The same arguments give the same bytes.

    A directory with anything in it is refused without `force`, and even then no other file is touched. All files
    are written before the first takes its place.
    """
    folder = Path(folder)
    adapter = folder / f"{ADAPTER}.{format}"
    stray = {folder / METADATA} if metadata is None else set()
    stray |= {folder / f"{ADAPTER}.{other}" for other in FORMATS if other != format}
    _check_folder(folder, stray, force)
    data = {"pt": torch_zip, "safetensors": safetensors}[format](tensors)
    files = {adapter: data, folder / CONFIG: _json(config)}
    if metadata is not None:
        files[folder / METADATA] = _json(metadata)
    made = not folder.exists()
    try:
        folder.mkdir(exist_ok=True)
        with ExitStack() as stack:
            for path, content in files.items():
                stack.enter_context(replacing(path)).write_bytes(content)
    except BaseException as e:
        if made:
            shutil.rmtree(folder, ignore_errors=True)
        if isinstance(e, OSError):
            raise LlamamemError(f"{folder}: cannot be written ({e.strerror}); give another --output") from None
        raise
    return list(files)


def materialize(sidecar: Sidecar, folder: str | Path, *, format: str = "pt", force: bool = False) -> list[Path]:
    """Writes the checkpoint that a sidecar was exported from: its tensors by source name, config and metadata."""
    tensors = checkpoint_tensors(sidecar).values()
    return write_checkpoint(folder, tensors, sidecar.config, _metadata(sidecar), format=format, force=force)


def checkpoint_tensors(sidecar: Sidecar) -> dict[str, GgufTensor]:
    """The tensors by source name, in the shapes, order of rows and bytes that the checkpoint had.

    They are in the order of the manifest; those of heads that are not active, which the file leaves out, come last.
    """
    tensors = {}
    for entry in json.loads(sidecar.get("tensor_manifest_json")):
        tensor = sidecar.tensors[entry["name"]]
        if sidecar.rope_head_dim and entry["name"].rpartition(".")[2] in PERMUTED:
            tensor = to_hf(tensor, sidecar.rope_head_dim)
        # some writers of GGUF leave out leading ones; the manifest has the checkpoint's shape
        shape = tuple(map(int, entry["shape"]))
        tensors[entry["source_name"]] = replace(tensor, name=entry["source_name"], shape=shape)
    return tensors | {tensor.name: tensor for tensor in _omitted(sidecar)}


def _omitted(sidecar: Sidecar) -> Iterator[GgufTensor]:
    """Zeros. The key is for people, so what is in it is checked here."""
    key, text = "omitted_tensors_json", sidecar.get("omitted_tensors_json")
    entries = [] if text is None else parse_json(f"{sidecar.path}: key '{sidecar.prefix}{key}'", text)
    layers = {layer.layer: layer for layer in sidecar.layers}
    idle = [head for head in HEADS if head not in sidecar.delta_heads]
    places = {
        f"{sidecar.source_prefix}{i}.self_attn.delta_{head}_proj": (
            (width, sidecar.rank * sidecar.heads),
            f"blk.{i}.delta_{head}",
        )
        for i, layer in layers.items()
        for head in idle
        if (width := layer.width(head))
    }
    for entry in entries if isinstance(entries, list) else [None]:
        source, dtype = (entry.get("source_name"), entry.get("dtype")) if isinstance(entry, dict) else (None, None)
        shape, name = places.pop(str(source), ((), ""))
        if not shape or dtype not in TYPE_SIZE or name in sidecar.tensors:
            text = f"{sidecar.path}: key '{sidecar.prefix}{key}' is no list of tensors that were left out"
            raise LlamamemError(f"{text}; export the sidecar again")
        yield GgufTensor(str(source), str(dtype), shape, bytes(prod(shape) * TYPE_SIZE[str(dtype)]))


def torch_zip(tensors: Iterable[GgufTensor]) -> bytes:
    """What torch.save writes for a dict of contiguous CPU tensors, for torch.load(weights_only=True)."""
    tensors = list(tensors)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:

        def add(name: str, data: bytes) -> None:
            info = zipfile.ZipInfo(f"{ADAPTER}/{name}")  # stored, of 1980: the same tensors give the same file
            start = out.tell() + 30 + len(info.filename) + 4
            padding = -start % _PAGE
            info.extra = b"FB" + padding.to_bytes(2, "little") + bytes(padding)
            archive.writestr(info, data)

        add("data.pkl", torch_pickle(tensors))
        add("byteorder", b"little")
        for i, tensor in enumerate(tensors):
            add(f"data/{i}", tensor.data)
        add("version", b"3\n")
    return out.getvalue()


def safetensors(tensors: Iterable[GgufTensor]) -> bytes:
    """A .safetensors file. By hand: the library takes BF16 only through an interface that it changed in 0.8."""
    header: dict[str, Any] = {}
    data = b""
    for t in sorted(tensors, key=lambda t: (-TYPE_SIZE[t.dtype], t.name)):  # the library's order, which keeps alignment
        ends = [len(data), len(data) + len(t.data)]
        header[t.name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": ends}
        data += t.data
    text = json.dumps({"__metadata__": {"format": "pt"}} | header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def _check_folder(folder: Path, stray: Iterable[Path], force: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise LlamamemError(f"{folder}: is a file; give a directory as --output")
    if not folder.exists():
        if not folder.parent.is_dir():
            raise LlamamemError(f"{folder}: the directory that it is in does not exist; create it first")
        return
    if not force and any(folder.iterdir()):
        raise LlamamemError(f"{folder}: is not empty; give another --output, or --force to replace its checkpoint")
    for rest in sorted(stray):
        if rest.exists():
            raise LlamamemError(f"{rest}: is there already, and one directory holds one adapter; remove it first")


def _metadata(sidecar: Sidecar) -> dict[str, Any] | None:
    key = f"{sidecar.prefix}adapter_metadata_json"
    text = sidecar.get("adapter_metadata_json")
    if text is None:  # since version 3: a checkpoint without the file
        return None if sidecar.format_version == 3 else {}
    try:
        value = parse_json(key, text)
    except LlamamemError:
        value = None
    if not isinstance(value, dict):
        raise LlamamemError(f"{sidecar.path}: key '{key}' is no JSON object, so there is no {METADATA} to write")
    return value


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=1).encode()
