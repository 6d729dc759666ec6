"""Where a verb may write: over nothing but a file of the kind that it makes, and never over one that it reads."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from llamamem.errors import LlamamemError
from llamamem.formats.gguf_file import read_gguf_index, replacing
from llamamem.formats.sidecar import ARCHITECTURES


def check_target(path: Path, flag: str, inputs: Iterable[Path], is_kind: Callable[[Path], bool], kind: str) -> None:
    """Refuses a path that cannot be written to, is one of `inputs`, or is a file that is not `kind`.

    `flag` is named in errors, `is_kind` asked only of a file that is there.
    """
    folder = path.parent
    if not folder.is_dir():
        raise LlamamemError(f"{path}: its directory does not exist; create it or give another {flag}")
    if path.is_dir():
        raise LlamamemError(f"{path}: is a directory; give a file name as {flag}")
    if not os.access(folder, os.W_OK):
        raise LlamamemError(f"{path}: its directory cannot be written to; give another {flag}")
    if not path.exists():
        return
    if any(source.exists() and path.samefile(source) for source in inputs):
        raise LlamamemError(f"{path}: is the input itself; give another {flag}")
    if not is_kind(path):
        raise LlamamemError(f"{path}: is there and is not {kind}; give another {flag}, or remove it yourself")


def check_sidecar_target(path: Path, inputs: Iterable[Path]) -> None:
    """The same for an --output that becomes a sidecar."""
    check_target(path, "--output", inputs, _is_sidecar, "a sidecar")


def check_manifest_target(path: Path, inputs: Iterable[Path]) -> None:
    """And for a --manifest: only what `write_json` has written for a sidecar is replaced."""
    check_target(path, "--manifest", inputs, _is_manifest, "a sidecar's manifest")


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file, beside its target and renamed: the same value gives the same bytes."""
    with replacing(path) as part:
        part.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _is_sidecar(path: Path) -> bool:
    try:
        return bool(read_gguf_index(path).get("general.architecture") in ARCHITECTURES)
    except LlamamemError:
        return False


def _is_manifest(path: Path) -> bool:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(value, dict) and {"sidecar", "sha256", "metadata", "tensors"} <= value.keys()
