"""A CUDA request that cannot be met ends the configuration with what is missing; a stand-in plays nvcc."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from llamamem.native import tools
from llamamem.native.identity import source_root

NVCC = """#!/bin/sh
[ "$1" = --list-gpu-arch ] && { echo compute_80; echo compute_90; exit 0; }
exit 1
"""


def configure(tmp_path: Path, *defines: str) -> tuple[int, str]:
    place = tmp_path / "build"
    command = [tools.cmake(), "-S", str(source_root()), "-B", str(place), "-G", "Ninja", "-DLLAMAMEM_BACKEND=cuda"]
    command += [f"-DCMAKE_MAKE_PROGRAM={tools.ninja()}", *defines]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not (place / "build.ninja").exists()
    refusal = place / "llamamem-refusal.txt"
    assert refusal.is_file(), done.stderr
    return done.returncode, refusal.read_text()


@pytest.fixture
def nvcc(tmp_path: Path) -> Path:
    path = tmp_path / "toolkit" / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    path.write_text(NVCC)
    path.chmod(0o755)
    return path


def test_no_nvcc(tmp_path: Path) -> None:
    everywhere = "/usr/bin;/usr/local/bin;/usr/local/cuda/bin;/opt/cuda/bin"
    status, refusal = configure(tmp_path, f"-DCMAKE_IGNORE_PATH={everywhere}")
    assert status == 1
    assert refusal.startswith("CUDA: nvcc was not found") and refusal.count("\n") == 1


def test_an_architecture_that_nvcc_does_not_know(tmp_path: Path, nvcc: Path) -> None:
    status, refusal = configure(tmp_path, f"-DLLAMAMEM_NVCC={nvcc}", "-DLLAMAMEM_CUDA_ARCH=90;61")
    assert status == 1
    assert "architecture 61 is not one that" in refusal and "(80 90)" in refusal


def test_no_cuda_runtime_or_no_cublas(tmp_path: Path, nvcc: Path) -> None:
    toolkit = nvcc.parent.parent
    status, refusal = configure(
        tmp_path, f"-DLLAMAMEM_NVCC={nvcc}", "-DLLAMAMEM_CUDA_ARCH=90", f"-DCUDAToolkit_ROOT={toolkit}"
    )
    assert status == 1
    assert "install" in refusal and ("CUDA runtime" in refusal or "cuBLAS" in refusal)


def test_a_backend_that_is_not_there(tmp_path: Path) -> None:
    _, refusal = configure(tmp_path, "-DLLAMAMEM_BACKEND=metal")
    assert refusal == "LLAMAMEM_BACKEND=metal: no such backend: use cpu or cuda\n"
