"""What the tests of the reference share; every module here skips itself by the same reason where PyTorch is missing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from model_fixtures import models  # noqa: F401

MODEL_A = Path(__file__).parents[1] / "data" / "model_a"


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors are slower on several threads, and sums are taken in the same order on every machine."""
    torch = pytest.importorskip("torch", reason="needs llamamem[reference]")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def own_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """State of the user who runs the tests stays untouched and unread."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture(scope="session")
def vectors() -> dict[str, np.ndarray]:
    """Ids, logits and states of model_a, from the PyTorch implementation that the maths come from."""
    with np.load(MODEL_A / "logits.npz") as file:
        return {name: file[name] for name in file.files if name != "meta"}


@pytest.fixture(scope="session")
def loaded() -> Any:
    """model_a, nothing attached."""
    from llamamem.reference.base import load_base

    return load_base(MODEL_A)


@pytest.fixture
def memory(loaded: Any) -> Iterator[Any]:
    """Its memory of semantics 1, attached for one test."""
    from llamamem.reference.attach import attach

    attached = attach(loaded.model, MODEL_A / "sidecar-v1.gguf")
    yield attached
    attached.remove()
