"""The random models of `tools/make_model.py`: made twice they are the same, and the runtime takes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from native_runs import logits, make_model

from llamamem.formats.sidecar import read_sidecar

pytestmark = pytest.mark.native


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    files = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        files.append(make_model(tmp_path / name, "tiny"))
    for one, other in zip(*files, strict=True):
        assert one.read_bytes() == other.read_bytes()
    (tmp_path / "c").mkdir()
    assert make_model(tmp_path / "c", "tiny", "--seed", "1")[0].read_bytes() != files[0][0].read_bytes()


@pytest.mark.parametrize("semantics", ["1", "2"])
def test_runtime_loads_them(product: Any, tmp_path: Path, semantics: str) -> None:
    base, sidecar = make_model(tmp_path, "tiny", "--semantics", semantics)
    ids = np.random.default_rng(0).integers(0, 448, 120)
    with_memory, without = product(logits, base, sidecar, ids), product(logits, base, None, ids)
    assert np.isfinite(with_memory).all()
    assert with_memory.std() > 0.1
    assert np.abs(with_memory - without).max() > 0.05


@pytest.mark.parametrize("arch", ["gemma3", "qwen3", "smollm3", "llama"])
@pytest.mark.parametrize("memory", ["rwkv_ms", "delta_rule"])
def test_every_architecture_with_both_kinds(product: Any, tmp_path: Path, arch: str, memory: str) -> None:
    base, made = make_model(tmp_path, "tiny", "--arch", arch, "--memory", memory)
    sidecar = read_sidecar(made)
    assert (sidecar.base_arch, sidecar.kind) == (arch, memory)
    got = product(logits, base, None, np.random.default_rng(0).integers(0, 448, 60))
    assert np.isfinite(got).all() and got.std() > 0.1
