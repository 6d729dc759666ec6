"""Runs in process, each library variant in a process of its own: a process can load one libllama only."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from model_fixtures import models  # noqa: F401
from native_runs import load_variant, make_model

DATA = Path(__file__).parents[1] / "data" / "model_a"

Run = Callable[..., Any]


class _Variant:
    """Calls functions in a process that has loaded one variant; a process that died is replaced by a new one."""

    def __init__(self, exact_gelu: bool):
        self.exact_gelu = exact_gelu
        self.pool: ProcessPoolExecutor | None = None

    def __call__(self, function: Run, *args: Any, **kwargs: Any) -> Any:
        if self.pool is None:
            self.pool = ProcessPoolExecutor(
                1, multiprocessing.get_context("spawn"), initializer=load_variant, initargs=(self.exact_gelu,)
            )
        try:
            return self.pool.submit(function, *args, **kwargs).result()
        except BrokenProcessPool:
            self.pool = None
            _find_build()  # the usual reason, and the clearer message
            raise

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown()


def _find_build() -> None:
    from llamamem.native.build import find_build

    find_build()


@pytest.fixture(scope="session")
def product() -> Iterator[Run]:
    """`product(function, *args)` runs it on the product build."""
    variant = _Variant(exact_gelu=False)
    yield variant
    variant.close()


@pytest.fixture(scope="session")
def exact() -> Iterator[Run]:
    """`exact(function, *args)` runs it on the test build, whose CPU GELU is exact."""
    variant = _Variant(exact_gelu=True)
    yield variant
    variant.close()


@pytest.fixture(scope="session")
def cli() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`cli("parity", ...)` runs a command and returns its exit status, stdout and stderr."""

    def run(*args: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "llamamem.cli", *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)

    return run


@pytest.fixture(scope="session")
def base() -> Path:
    """The tiny Gemma 4 whose logits are known."""
    return DATA / "model-f32.gguf"


@pytest.fixture(scope="session")
def reference() -> dict[str, np.ndarray]:
    """Its ids, logits and states, from the PyTorch reference."""
    with np.load(DATA / "logits.npz") as file:
        return {name: file[name] for name in file.files if name != "meta"}


@pytest.fixture(scope="session")
def sidecars(tmp_path_factory: pytest.TempPathFactory, cli: Run, base: Path) -> dict[str, Path]:
    """Its adapter exported for semantics 1 (`v1`) and 2 (`v2`)."""
    folder = tmp_path_factory.mktemp("sidecars")
    made = {"v1": folder / "v1.gguf", "v2": folder / "v2.gguf"}
    for name, config in (("v1", "delta_mem_config.json"), ("v2", "delta_mem_config_v2.json")):
        done = cli("sidecar", "export", DATA, "--base", base, "--output", made[name], "--config", config)
        assert done.returncode == 0, done.stderr
    return made


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A random base with heads wide enough for a Q8_0 KV cache, and a sidecar for it."""
    return make_model(tmp_path_factory.mktemp("small"), "small")


@pytest.fixture(scope="session")
def quantise() -> Callable[[Path, Path, str], Path]:
    """`quantise(source, made, "Q4_K_M")` runs llama-quantize."""
    from llamamem.native.build import find_build

    program = find_build().bin_dir / "llama-quantize"

    def run(source: Path, made: Path, kind: str) -> Path:
        command = [program, "--allow-requantize", source, made, kind, "1"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return made

    return run


@pytest.fixture(scope="session")
def small_zero(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same base, and a sidecar whose deltas are zero."""
    return make_model(tmp_path_factory.mktemp("small-zero"), "small", "--zero-deltas")
