"""Writes checkpoint directories: the way back from a sidecar, without torch."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from llamamem.errors import LlamamemError
from llamamem.formats.checkpoint.reader import ADAPTER, CONFIG, METADATA
from llamamem.formats.checkpoint.torch_pickle import torch_pickle
from llamamem.formats.gguf_file import TYPE_SIZE, GgufTensor, replacing
from llamamem.formats.json_text import parse_json
from llamamem.formats.sidecar import PREFIX, Sidecar

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
    """Writes the files of a checkpoint and returns their paths; without metadata there is no such file.

    The same arguments give the same bytes.

    A directory with anything in it is refused without `force`, and even then no other file is touched. All files
    are written before the first takes its place.
    """
    folder = Path(folder)
    adapter = folder / f"{ADAPTER}.{format}"
    _check_folder(folder, adapter, force)
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
    """The tensors by source name, in the shapes that the checkpoint had, in the order of the manifest."""
    manifest = json.loads(sidecar.fields[f"{PREFIX}tensor_manifest_json"].value)
    return {
        # some writers of GGUF leave out leading ones; the manifest has the checkpoint's shape
        entry["source_name"]: replace(
            sidecar.tensors[entry["name"]], name=entry["source_name"], shape=tuple(map(int, entry["shape"]))
        )
        for entry in manifest
    }


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


def _check_folder(folder: Path, adapter: Path, force: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise LlamamemError(f"{folder}: is a file; give a directory as --output")
    if not folder.exists():
        if not folder.parent.is_dir():
            raise LlamamemError(f"{folder}: the directory that it is in does not exist; create it first")
        return
    if not force and any(folder.iterdir()):
        raise LlamamemError(f"{folder}: is not empty; give another --output, or --force to replace its checkpoint")
    for other in FORMATS:
        rest = folder / f"{ADAPTER}.{other}"
        if rest != adapter and rest.exists():
            raise LlamamemError(f"{rest}: is there already, and one directory holds one adapter; remove it first")


def _metadata(sidecar: Sidecar) -> dict[str, Any]:
    key = f"{PREFIX}adapter_metadata_json"
    field = sidecar.fields.get(key)
    try:
        value = parse_json(key, field.value) if field is not None else {}
    except LlamamemError:
        value = None
    if not isinstance(value, dict):
        raise LlamamemError(f"{sidecar.path}: key '{key}' is no JSON object, so there is no {METADATA} to write")
    return value


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=1).encode()
