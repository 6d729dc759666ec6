"""Sidecars of version 3 in the runtime: Python reads what it saves of both kinds, and both refuse a base alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from native_runs import base_refusal, saved_memory

from llamamem.formats.sidecar import export as exporter
from llamamem.formats.sidecar import validate_sidecar
from llamamem.formats.sidecar.export import export_sidecar
from llamamem.formats.state import read_state, write_state

pytestmark = pytest.mark.native

BASE = "model-f32.gguf"
Run = Callable[..., Any]


@pytest.mark.parametrize("name", ["qwen3_delta_msw", "smollm3_delta", "llama_rwkv_ms"])
def test_a_saved_memory_is_what_the_original_learnt(
    name: str, exact: Run, models: dict[str, Path], tmp_path: Path
) -> None:
    folder = models[name]
    recorded = np.load(folder / "logits.npz")
    sidecar = export_sidecar(folder, folder / BASE, tmp_path / "x.gguf")
    exact(saved_memory, folder / BASE, tmp_path / "x.gguf", recorded["p1_ids"], tmp_path / "x.state")
    state = read_state(tmp_path / "x.state", sidecar=sidecar)
    expected = recorded["p1_S" if "p1_S" in recorded else "p1_v1_S"]
    assert np.abs(state.S.ravel() - expected.ravel()).max() <= 5e-6
    assert state.memory_kind == sidecar.kind
    assert (state.tokens_written == len(recorded["p1_ids"])).all()
    write_state(tmp_path / "y.state", state)
    assert (tmp_path / "y.state").read_bytes() == (tmp_path / "x.state").read_bytes()


@pytest.mark.parametrize(("name", "order"), [("smollm3_delta", "hf"), ("llama_rwkv_ms", "hf"), ("qwen3_delta", "norm")])
def test_rows_in_the_wrong_order_are_refused(
    name: str, order: str, exact: Run, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, path = models[name], tmp_path / "x.gguf"
    monkeypatch.setattr(exporter, "ROWS", {})
    monkeypatch.setattr("llamamem.formats.sidecar.base.ROWS", {})
    export_sidecar(folder, folder / BASE, path, row_order=order)
    monkeypatch.undo()
    assert [finding.reason for finding in validate_sidecar(path, folder / BASE).findings] == ["base-rows"]
    assert "[base-rows]" in exact(base_refusal, folder / BASE, path)


def test_a_sidecar_of_another_architecture(exact: Run, models: dict[str, Path], tmp_path: Path) -> None:
    other, folder = models["qwen3_delta"], models["llama_rwkv_ms"]
    export_sidecar(folder, folder / BASE, tmp_path / "x.gguf")
    findings = validate_sidecar(tmp_path / "x.gguf", other / BASE).findings
    assert findings[0].reason == "base-architecture"
    assert "[base-architecture]" in exact(base_refusal, other / BASE, tmp_path / "x.gguf")


def test_a_memory_of_all_layers_on_a_deeper_base(exact: Run, models: dict[str, Path], tmp_path: Path) -> None:
    other, folder = models["qwen3_rwkv_ms"], models["qwen3_delta"]
    export_sidecar(folder, folder / BASE, tmp_path / "x.gguf")
    assert validate_sidecar(tmp_path / "x.gguf", other / BASE).findings[0].reason == "base-shape"
    assert "[base-shape] the base has 5 layers" in exact(base_refusal, other / BASE, tmp_path / "x.gguf")
