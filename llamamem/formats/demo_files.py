"""The files of the demo model that llamamem carries: a base, an adapter, and both as the server reads them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llamamem.errors import LlamamemError

BASE, ADAPTER, MODEL, SIDECAR = "base", "adapter", "demo-f32.gguf", "demo-memory.gguf"


@dataclass(frozen=True)
class DemoFiles:
    base: Path  # directory in Hugging Face's form
    adapter: Path  # checkpoint directory
    model: Path  # the base as GGUF
    sidecar: Path


def demo_files(directory: Path | None = None) -> DemoFiles:
    """Those of the package, or of another directory that tools/make_demo_model.py wrote."""
    root = Path(__file__).resolve().parents[1] / "demo" if directory is None else directory
    files = DemoFiles(root / BASE, root / ADAPTER, root / MODEL, root / SIDECAR)
    for path in (files.model, files.sidecar):
        if not path.is_file():
            raise LlamamemError(f"{path}: no such file; `python tools/make_demo_model.py --output {root}` makes it")
    return files
