"""The whole models in tests/data/models, unpacked."""

from __future__ import annotations

import lzma
import shutil
from pathlib import Path

import pytest

MODELS = Path(__file__).parent / "data" / "models"
NAMES = tuple(sorted(path.name for path in MODELS.iterdir()))


def unpack(name: str, folder: Path) -> Path:
    """A copy of a fixture with its GGUF as it was."""
    made = folder / name
    shutil.copytree(MODELS / name, made)
    for file in made.glob("*.gguf.xz"):
        file.with_suffix("").write_bytes(lzma.decompress(file.read_bytes()))
        file.unlink()
    return made


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """All of them, by name."""
    folder = tmp_path_factory.mktemp("models")
    return {name: unpack(name, folder) for name in NAMES}
