from __future__ import annotations

from pathlib import Path

import pytest

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture
def model_a() -> Path:
    """The tiny Gemma 4 with its adapter checkpoint."""
    return DATA / "model_a"


@pytest.fixture
def layers() -> list[Path]:
    """The layer fixtures."""
    return sorted((DATA / "layers").glob("layer_*.npz"))
