from __future__ import annotations

from pathlib import Path

import pytest
from model_fixtures import models  # noqa: F401

from llamamem.formats.sidecar.export import export_sidecar


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sidecar of model_a, semantics 1. Not to be changed."""
    model_a = Path(__file__).parents[2] / "data/model_a"
    path = tmp_path_factory.mktemp("sidecar") / "a.gguf"
    export_sidecar(model_a, model_a / "model-f32.gguf", path)
    return path
