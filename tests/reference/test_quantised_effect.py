"""Quantised bases: a memory does to them what the reference on the dequantised weights says."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs llamamem[reference]")
pytest.importorskip("transformers", reason="needs llamamem[reference]")

from llamamem.formats.sidecar.export import export_sidecar  # noqa: E402
from llamamem.native.build import find_build  # noqa: E402
from llamamem.native.runtime import load_library  # noqa: E402
from llamamem.proof.effect import Effect, compare_effects, measure_effect  # noqa: E402

TOOLS = Path(__file__).parents[2] / "tools"
IDS = np.random.default_rng(3).integers(263, 448, 48)

Measure = Callable[[Path, Path], Effect]


@pytest.fixture(scope="module")
def measure() -> Iterator[Measure]:
    """In a process of its own, which may load a library."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=load_library) as pool:

        def run(base: Path, sidecar: Path) -> Effect:
            # of a GELU the product build has fp16's table
            return pool.submit(measure_effect, base, sidecar, IDS, gelu="ggml").result()

        yield run


@pytest.mark.parametrize(
    ("arch", "memory", "preset"),
    [
        ("qwen3", "delta_rule", "small"),
        ("smollm3", "delta_rule", "small"),  # rows of q permuted, on every layer
        ("llama", "rwkv_ms", "small"),
        ("gemma3", "rwkv_ms", "small"),
        ("gemma4", "delta_rule", "tiny"),  # whose last layer attends fully, which Hugging Face's must
    ],
)
def test_the_effect_of_a_memory(measure: Measure, tmp_path: Path, arch: str, memory: str, preset: str) -> None:
    plain, checkpoint = tmp_path / "f32.gguf", tmp_path / "checkpoint"
    command = [sys.executable, TOOLS / "make_model.py", "--arch", arch, "--preset", preset, "--memory", memory]
    subprocess.run([*command, "--output", plain, "--checkpoint", checkpoint], check=True, capture_output=True)
    found = {}
    for kind in ("Q8_0", "Q4_K_M"):
        base = tmp_path / f"{kind}.gguf"
        quantize = [find_build().bin_dir / "llama-quantize", plain, base, kind, "1"]
        subprocess.run(quantize, check=True, capture_output=True)
        export_sidecar(checkpoint, base, tmp_path / f"{kind}-memory.gguf")
        found[kind] = measure(base, tmp_path / f"{kind}-memory.gguf")
        assert found[kind].ok, found[kind].summary
        assert found[kind].native > 5 * found[kind].apart, found[kind].summary  # or nothing could be told
    export_sidecar(checkpoint, plain, tmp_path / "f32-memory.gguf")
    exact = measure(plain, tmp_path / "f32-memory.gguf")
    # the GELU of both is a table of fp16, where one rounding may move a value to the next entry
    assert exact.base < found["Q8_0"].base / 5 and exact.ok and exact.states < 1e-3, exact.summary


def test_an_effect_that_is_not_the_references_is_no_rounding() -> None:
    rng = np.random.default_rng(0)
    base, effect = rng.normal(size=(2, 40, 300)).astype(np.float32)
    rounding = 0.02 * rng.normal(size=(2, 40, 300)).astype(np.float32)
    S = rng.normal(size=(4, 1, 8, 8))
    reference = (base, base + effect, S)
    native = (base + rounding[0], base + effect + rounding[1], S)
    assert compare_effects(native, reference).ok
    for wrong in (0.0 * effect, 0.8 * effect, np.roll(effect, 1, axis=0), effect + 0.2):
        assert not compare_effects((native[0], native[0] + wrong, S), reference).ok
    assert not replace(compare_effects(native, reference), native=float("nan")).ok
