"""Whole-model fixtures: what they must find, and the commands that take a folder of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from native_runs import fixture_reports

from llamamem.formats.sidecar import read_sidecar
from llamamem.formats.sidecar import rows as sidecar_rows
from llamamem.formats.sidecar.export import export_sidecar

pytestmark = pytest.mark.native


def test_the_memory_makes_a_difference(models: dict[str, Path]) -> None:
    for folder in models.values():
        with np.load(folder / "logits.npz") as arrays:
            mem = arrays["p1_mem" if "p1_mem" in arrays else "p1_mem_v1"]
            assert float(np.abs(mem - arrays["p1_base"]).max()) > 0.1


@pytest.mark.parametrize("name", ["smollm3_delta", "llama_rwkv_ms"])
def test_rows_that_are_not_permuted_are_found(
    exact: Any, models: dict[str, Path], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one mistake that is made outside of the runtime: an export that leaves the rows of q as they are."""
    monkeypatch.setattr(sidecar_rows, "_reordered", lambda tensor, split: tensor)
    export_sidecar(models[name], models[name] / "model-f32.gguf", tmp_path / "wrong.gguf")
    assert read_sidecar(tmp_path / "wrong.gguf").row_order == "norm"
    reports = exact(fixture_reports, models[name], tmp_path / "wrong.gguf")
    assert max(report.logits for report in reports) > 0.1


def test_the_commands_take_a_folder(cli: Any, models: dict[str, Path], tmp_path: Path) -> None:
    done = cli("parity", "--fixture", models["smollm3_delta"], "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["models"]
    assert found["atol"] == 5e-5 and len(found["cases"]) == 12 and all(case["ok"] for case in found["cases"])
    done = cli("fixture", "check", models["qwen3_delta"], "--engine", "native", "--atol", "0")
    assert done.returncode == 1 and "FAIL" in done.stdout
    done = cli("fixture", "check", tmp_path, "--engine", "native")
    assert done.returncode == 2 and "logits.npz" in done.stderr and "Traceback" not in done.stderr
    done = cli("parity", "--fixture", models["qwen3_delta"], "--ids", models["qwen3_delta"] / "logits.npz")
    assert done.returncode == 2 and "give it alone" in done.stderr
