"""What the native tests read from tests/data is what the tools make today."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader

from llamamem.formats.sidecar.export import export_sidecar

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data"
MODEL_A = DATA / "model_a"


@pytest.mark.parametrize(
    ("name", "config"), [("sidecar-v1.gguf", None), ("sidecar-v2.gguf", "delta_mem_config_v2.json")]
)
def test_sidecars_are_the_exported_checkpoint(tmp_path: Path, name: str, config: str | None) -> None:
    export_sidecar(MODEL_A, MODEL_A / "model-f32.gguf", tmp_path / name, config=config)
    assert (tmp_path / name).read_bytes() == (MODEL_A / name).read_bytes()


def test_op_vectors_are_the_oracles(tmp_path: Path) -> None:
    made = tmp_path / "op-vectors.gguf"
    subprocess.run([sys.executable, ROOT / "tools" / "make_op_vectors.py", made], check=True)
    ours = {t.name: t.data for t in GGUFReader(made).tensors}
    kept = {t.name: t.data for t in GGUFReader(DATA / "op-vectors.gguf").tensors}
    assert ours.keys() == kept.keys()
    for name, array in ours.items():
        np.testing.assert_allclose(array, kept[name], atol=2e-5, rtol=2e-5, err_msg=name)
