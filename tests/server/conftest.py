"""A real server for every test here: the build that `llamamem build` made, a tiny Gemma 4, its exported sidecar."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from server_runs import Running, Serve, ServeDemo, started

from llamamem.formats.demo_files import demo_files
from llamamem.native.build import Build, find_build

MODEL_A = Path(__file__).resolve().parents[1] / "data" / "model_a"


@pytest.fixture(autouse=True)
def own_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """State, cache and llama.cpp configuration of the user who runs the tests stay untouched and unread."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


@pytest.fixture(scope="session")
def build() -> Build:
    return find_build()


@pytest.fixture(scope="session")
def model() -> Path:
    return MODEL_A / "model-f32.gguf"


@pytest.fixture(scope="session")
def sidecar(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sidecar") / "model_a.gguf"
    command = [sys.executable, "-m", "llamamem.cli", "sidecar", "export", str(MODEL_A)]
    subprocess.run([*command, "--base", str(model), "--output", str(path)], check=True)
    return path


@pytest.fixture
def serve(build: Build, model: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Serve]:
    """`serve("fused", "-ub", "8", parallel=2)` starts a server of that profile and waits until it is ready."""
    with ExitStack() as stack:

        def start(profile: str, *extra: str, **kwargs: Any) -> Running:
            memory = None if profile == "base" else request.getfixturevalue("sidecar")
            return started(stack, build, tmp_path, model, memory, profile, *extra, **kwargs)

        yield start


@pytest.fixture
def serve_demo(build: Build, tmp_path: Path) -> Iterator[ServeDemo]:
    """`serve` with the demo model."""
    files = demo_files()
    with ExitStack() as stack:
        yield partial(started, stack, build, tmp_path, files.model, files.sidecar)
