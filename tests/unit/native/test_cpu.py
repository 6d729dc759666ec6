"""AMX is tried before it is built for, and a build for another CPU is refused by name."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llamamem.errors import LlamamemError
from llamamem.native import cpu, tools
from llamamem.native.identity import source_root
from llamamem.native.vendor import tree_path
from llamamem.serving.preflight import check_binary

PROJECT = """cmake_minimum_required(VERSION 3.21...3.28)
project(probe LANGUAGES CXX)
set(CMAKE_BUILD_TYPE Release)
set(LLAMAMEM_PYTHON "${{CMAKE_COMMAND}}" -E env "PYTHONPATH={root}" "{python}" -m)
include({root}/cmake/cpu.cmake)
llamamem_try_amx()
file(WRITE "${{CMAKE_BINARY_DIR}}/ggml-cpu.cpp" "")
add_library(ggml-cpu STATIC "${{CMAKE_BINARY_DIR}}/ggml-cpu.cpp")
target_compile_options(ggml-cpu PRIVATE -march=native)
llamamem_record_cpu()
"""

CRASH = "#include <csignal>\nint main() { return std::raise(SIGILL); }\n"
ASKS_NOTHING = "int main() { return 0; }\n"
NO_PERMISSION = "int main() { return 2; }\n"
BARRIER = '__asm__ volatile("" : : "r"(&tc) : "memory");'
HERE = "amx_int8" in cpu._cpuinfo("flags")
MMQ = Path("ggml", "src", "ggml-cpu", "amx", "mmq.cpp")


def try_amx(folder: Path, *, tree: Path | None = None, probe: str | None = None) -> tuple[str, str]:
    """What the build's record says of AMX, and how a file is compiled; a CPU without it is stood in for."""
    (folder / "CMakeLists.txt").write_text(PROJECT.format(root=source_root(), python=sys.executable))
    arguments = [f"-DLLAMAMEM_TREE={tree or tree_path()}", f"-DCMAKE_MAKE_PROGRAM={tools.ninja()}"]
    if probe is not None:
        (folder / "probe.cpp").write_text(probe)
        arguments += [f"-DLLAMAMEM_AMX_PROBE={folder / 'probe.cpp'}", "-DLLAMAMEM_NATIVE_HAS_AMX=ON"]
    command = [tools.cmake(), "-S", str(folder), "-B", str(folder / "out"), "-G", "Ninja", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    made = cpu.read_record(folder / "out" / "bin")
    assert made is not None
    # the record is of what the flags give, and the flags come after -march=native
    assert ("amx_int8" in made.features) == (made.amx == "used" and HERE)
    lines = (folder / "out" / "build.ninja").read_text().splitlines()
    return made.amx, next(line.strip() for line in lines if line.strip().startswith("FLAGS = ") and "-march" in line)


@pytest.mark.parametrize(
    ("probe", "said"),
    [
        (CRASH, "left out: the compiler's code crashes on this CPU"),
        (NO_PERMISSION, "left out: the kernel does not permit it"),
        ("no C++ at all", "left out: the compiler does not take its intrinsics"),
        (ASKS_NOTHING, "used"),
    ],
    ids=["crashes", "no-permission", "no-compile", "works"],
)
def test_what_does_not_run_is_left_out(tmp_path: Path, probe: str, said: str) -> None:
    amx, flags = try_amx(tmp_path, probe=probe)
    assert amx == said
    if said.startswith("left out"):
        assert all(flag in flags.split() for flag in ("-mno-amx-tile", "-mno-amx-int8", "-mno-amx-bf16"))
    else:
        assert "-mno" not in flags


@pytest.mark.skipif(not HERE, reason="this CPU has no AMX")
def test_the_code_of_the_tree_is_what_is_tried(tmp_path: Path) -> None:
    """Without its patch the compiler of Debian 12 drops the stores, and the probe crashes as the runtime would."""
    stock = tmp_path / "tree"
    (stock / MMQ).parent.mkdir(parents=True)
    text = (tree_path() / MMQ).read_text()
    assert text.count(BARRIER) == 1
    (stock / MMQ).write_text(text.replace(BARRIER, ""))
    (tmp_path / "patched").mkdir()
    assert try_amx(tmp_path / "patched")[0] == "used"
    compiler = tools.version(tools.compilers()[1])
    if "g++" in Path(tools.compilers()[1]).resolve().name and compiler < (12, 4):
        assert try_amx(tmp_path, tree=stock)[0] == "left out: the compiler's code crashes on this CPU"


def record(bin_dir: Path, *features: str, machine: str = "") -> Path:
    bin_dir.mkdir(exist_ok=True)
    fields = {"compiler": "GNU 12.2.0", "machine": machine or cpu.platform.machine(), "features": features, "amx": ""}
    (bin_dir / "llamamem-cpu.json").write_text(json.dumps(fields))
    return bin_dir


@pytest.fixture
def old_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proc = tmp_path / "cpuinfo"
    proc.write_text("processor\t: 0\nmodel name\t: An Old CPU\nflags\t\t: fpu sse4_2 avx avx2 fma\n\nprocessor\t: 1\n")
    monkeypatch.setattr(cpu, "_PROC", proc)


def test_a_build_for_another_cpu_is_refused_by_name(tmp_path: Path, old_cpu: None) -> None:
    cpu.check_cpu(record(tmp_path / "fits", "avx", "avx2"))
    cpu.check_cpu(tmp_path / "no-record")
    with pytest.raises(
        LlamamemError, match="a CPU with avx512f, amx_int8, which An Old CPU lacks: run `llamamem build"
    ):
        cpu.check_cpu(record(tmp_path / "newer", "avx2", "avx512f", "amx_int8"))
    with pytest.raises(LlamamemError, match="was built for riscv64"):
        cpu.check_cpu(record(tmp_path / "other", machine="riscv64"))


def test_preflight_asks_before_it_runs_anything(tmp_path: Path, old_cpu: None) -> None:
    bin_dir = record(tmp_path / "bin", "avx512f")
    shutil.copy("/bin/true", bin_dir / "llama-server")
    with pytest.raises(LlamamemError, match="avx512f"):
        check_binary(bin_dir)


def test_the_features_are_those_of_the_compilers_flags(tmp_path: Path) -> None:
    cxx = tools.compilers()[1]
    if cpu.platform.machine() != "x86_64":
        pytest.skip("the flags are those of x86")
    cpu._write(tmp_path, "GNU 1", "used", [cxx, "-mavx2", "-mno-fma"])
    made = cpu.read_record(tmp_path)
    assert made is not None and "avx2" in made.features and not {"fma", "avx512f"} & set(made.features)
    assert made.amx == "used"
