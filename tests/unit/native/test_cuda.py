"""A CUDA request that cannot be met ends the configuration with what is missing; a stand-in plays nvcc."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llamamem.native import tools
from llamamem.native.identity import source_root

NVCC = """#!/bin/sh
case "$1" in
    --list-gpu-arch) echo compute_80; echo compute_90; exit 0 ;;
    --version) echo "Cuda compilation tools, release 13.0, V13.0.88"; exit 0 ;;
esac
echo "host_config.h:123:2: error: -- unsupported GNU version! gcc versions later than 15 are not supported!" >&2
exit 1
"""


@pytest.fixture(autouse=True)
def no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine has none, and no toolkit that the environment names."""
    for name in ("CUDACXX", "CUDAHOSTCXX", "CUDA_HOME", "CUDA_PATH", "CONDA_PREFIX"):
        monkeypatch.delenv(name, raising=False)
    program = tmp_path / "path" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\nexit 9\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")


def configure(tmp_path: Path, *defines: str) -> tuple[int, str]:
    place = tmp_path / "build"
    command = [
        tools.cmake(),
        "-S",
        str(source_root()),
        "-B",
        str(place),
        "-G",
        "Ninja",
        "-DLLAMAMEM_BACKEND=cuda",
        "-DLLAMAMEM_NVIDIA_WHEELS=",
    ]
    command += [f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_MAKE_PROGRAM={tools.ninja()}", *defines]
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


@pytest.fixture
def toolkit(nvcc: Path) -> Path:
    """Runtime and cuBLAS as the wheels have them: no name without a version."""
    root = nvcc.parent.parent
    for path in ("include/cuda_runtime.h", "include/cublas_v2.h", "lib/libcudart.so.13", "lib/libcublas.so.13"):
        (root / path).parent.mkdir(exist_ok=True)
        (root / path).touch()
    return root


def test_a_host_compiler_that_nvcc_does_not_take(tmp_path: Path, nvcc: Path, toolkit: Path) -> None:
    status, refusal = configure(tmp_path, f"-DLLAMAMEM_NVCC={nvcc}", f"-DCUDAToolkit_ROOT={toolkit}")
    assert status == 1
    assert "unsupported GNU version" in refusal and "set CUDAHOSTCXX" in refusal and "/c++" in refusal


def test_no_cublas_beside_a_whole_toolkit(tmp_path: Path, nvcc: Path, toolkit: Path) -> None:
    (toolkit / "include/cublas_v2.h").unlink()
    status, refusal = configure(tmp_path, f"-DLLAMAMEM_NVCC={nvcc}", f"-DCUDAToolkit_ROOT={toolkit}")
    assert status == 1
    assert refusal.startswith("CUDA: cuBLAS") and "pip install nvidia-cublas" in refusal


def test_native_without_a_gpu(tmp_path: Path, nvcc: Path) -> None:
    _, refusal = configure(tmp_path, f"-DLLAMAMEM_NVCC={nvcc}", "-DLLAMAMEM_CUDA_ARCH=native")
    assert refusal == ("CUDA: --arch native: nvidia-smi shows no GPU here: name the architecture, as in --arch 90\n")


def test_an_architecture_too_old(tmp_path: Path, nvcc: Path) -> None:
    nvcc.write_text(NVCC.replace("compute_80", "compute_70"))
    _, refusal = configure(tmp_path, f"-DLLAMAMEM_NVCC={nvcc}", "-DLLAMAMEM_CUDA_ARCH=70")
    assert "architecture 70 is older than 75" in refusal


def test_an_nvcc_that_does_not_run(tmp_path: Path, nvcc: Path) -> None:
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    _, refusal = configure(tmp_path, f"-DLLAMAMEM_NVCC={nvcc}")
    assert f"{nvcc} does not run" in refusal


def test_a_backend_that_is_not_there(tmp_path: Path) -> None:
    _, refusal = configure(tmp_path, "-DLLAMAMEM_BACKEND=metal")
    assert refusal == "LLAMAMEM_BACKEND=metal: no such backend: use cpu or cuda\n"
