"""Where a verb may write: over nothing but a file of the kind that it makes, and never over one that it reads."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llamamem.errors import LlamamemError
from llamamem.formats.gguf_file import read_gguf_index, replacing
from llamamem.formats.sidecar import ARCHITECTURE


def check_sidecar_target(path: Path, inputs: Iterable[Path]) -> None:
    """Refuses an --output that cannot be made, is one of `inputs`, or is a file that is no sidecar."""
    _check_target(path, "--output", inputs)
    if path.exists() and not _is_sidecar(path):
        raise LlamamemError(f"{path}: is there and is not a sidecar; give another --output, or remove it yourself")


def check_manifest_target(path: Path, inputs: Iterable[Path]) -> None:
    """The same for a --manifest: only what `write_json` has written for a sidecar is replaced."""
    _check_target(path, "--manifest", inputs)
    if path.exists() and not _is_manifest(path):
        raise LlamamemError(
            f"{path}: is there and is not a sidecar's manifest; give another --manifest, or remove it yourself"
        )


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file, beside its target and renamed: the same value gives the same bytes."""
    with replacing(path) as part:
        part.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _check_target(path: Path, flag: str, inputs: Iterable[Path]) -> None:
    folder = path.parent
    if not folder.is_dir():
        raise LlamamemError(f"{path}: its directory does not exist; create it or give another {flag}")
    if path.is_dir():
        raise LlamamemError(f"{path}: is a directory; give a file name as {flag}")
    if not os.access(folder, os.W_OK):
        raise LlamamemError(f"{path}: its directory cannot be written to; give another {flag}")
    if path.exists() and any(source.exists() and path.samefile(source) for source in inputs):
        raise LlamamemError(f"{path}: is the input itself; give another {flag}")


def _is_sidecar(path: Path) -> bool:
    try:
        return bool(read_gguf_index(path).get("general.architecture") == ARCHITECTURE)
    except LlamamemError:
        return False


def _is_manifest(path: Path) -> bool:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(value, dict) and {"sidecar", "sha256", "metadata", "tensors"} <= value.keys()
