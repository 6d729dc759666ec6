"""Build the native runtime, find a build, and ask one who it is.

A build directory belongs to a backend and its flags; a note in it, written last, says which pin and patch set it holds.
A changed source is therefore an incremental build in the same directory, and an interrupted one is never taken for
finished.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock, Timeout

from llamamem.errors import LlamamemError
from llamamem.native import tools, vendor
from llamamem.native.compile import run_cmake, run_ninja
from llamamem.native.cpu import check_cpu, read_record
from llamamem.native.identity import EDITED, source_root
from llamamem.native.sdist import cache_dir

__all__ = ["BACKENDS", "Build", "ask_identity", "build", "builds", "builds_dir", "find_build"]

BACKENDS = ("cpu", "cuda")
PROGRAMS = ("llama-server", "llama-completion", "llama-bench", "llama-quantize", "llama-gguf-split")
_NOTE = "llamamem-build.json"


@dataclass(frozen=True)
class Build:
    """Where a build lies and which it is; `lib_dir` (libllama, libggml*) is what `LLAMA_CPP_LIB_PATH` wants."""

    root: Path
    bin_dir: Path
    lib_dir: Path
    backend: str
    identity: str


def builds_dir(root: Path | None = None) -> Path:
    """`build/` of the checkout; for an installed wheel a directory in the user's cache."""
    root = root or source_root()
    return cache_dir() / "build" if root.name == "_source" else root / "build"


# -- find ---------------------------------------------------------------------------------------------------------


def find_build(backend: str | None = None, exact_gelu: bool = False, bin_dir: str | Path | None = None) -> Build:
    """The build to use: `bin_dir`, else `LLAMAMEM_BIN_DIR`, else the last one made here of this pin and patch set.

    `exact_gelu` asks for the CPU library without the fp16 GELU table. Raises `LlamamemError` with the next step.
    """
    given = bin_dir or os.environ.get("LLAMAMEM_BIN_DIR")
    if given:
        found = _given_build(Path(given), "--bin-dir" if bin_dir else "LLAMAMEM_BIN_DIR")
    else:
        found = _own_build(backend)
        check_cpu(found.bin_dir)
    if not exact_gelu:
        return found
    lib_dir = found.root / "bin-exact"
    if not (lib_dir / _library("ggml-cpu")).is_file():
        raise LlamamemError(
            f"{found.root}: has no bin-exact/, the exact-GELU test library: run `llamamem build` in a checkout"
        )
    return Build(found.root, found.bin_dir, lib_dir, found.backend, found.identity)


def _library(name: str) -> str:
    return f"lib{name}.dylib" if sys.platform == "darwin" else f"lib{name}.so"


def _given_build(bin_dir: Path, origin: str) -> Build:
    bin_dir = bin_dir.expanduser().resolve()
    check_cpu(bin_dir)
    where, wanted, said = f"{origin}={bin_dir}", vendor.identity(), ask_identity(bin_dir)
    if said is None:
        raise LlamamemError(
            f"{where}: its llama-server is missing, does not run or is not llamamem's build: this needs {wanted}, "
            f"unset {origin} and run `llamamem build`"
        )
    if said != wanted:
        raise LlamamemError(f"{where}: is build {said}, this package needs {wanted}: build it again from these sources")
    backend = "cuda" if (bin_dir / _library("ggml-cuda")).exists() else "cpu"
    return Build(bin_dir.parent, bin_dir, bin_dir, backend, said)


def ask_identity(bin_dir: Path) -> str | None:
    """The identity that `llama-server --version` reports, None when it reports none or does not run."""
    try:
        done = subprocess.run(
            [str(bin_dir / "llama-server"), "--version"], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"(?m)^llamamem: (\S+)$", done.stdout + done.stderr)
    return found[1] if found and done.returncode == 0 else None


def builds(root: Path | None = None) -> list[Build]:
    """Finished builds of this package, of whatever identity, the last one made first."""
    root = root or source_root()
    places = [path.parent for path in builds_dir(root).glob(f"*/{_NOTE}")]
    packaged = Path(__file__).resolve().parent / "_dist"
    if (packaged / _NOTE).is_file():
        places.append(packaged)
    found = []
    for place in places:
        note = _read(place / _NOTE)
        if note and all((place / "bin" / name).is_file() for name in PROGRAMS):
            made = Build(place, place / "bin", place / "bin", str(note["backend"]), str(note["identity"]))
            found.append(((place / _NOTE).stat().st_mtime, made))
    return [made for _, made in sorted(found, key=lambda entry: -entry[0])]


def _own_build(backend: str | None) -> Build:
    wanted = vendor.identity()
    of_backend = [made for made in builds() if backend in (None, made.backend)]
    for made in of_backend:
        if made.identity == wanted:
            return made
    command = f"llamamem build --backend {backend}" if backend else "llamamem build"
    if of_backend:
        raise LlamamemError(
            f"{of_backend[0].root}: is build {of_backend[0].identity}, the sources are {wanted}: run `{command}`"
        )
    raise LlamamemError(
        f"there is no {backend + ' ' if backend else ''}build of llamamem {wanted} yet: run `{command}`"
    )


# -- make ---------------------------------------------------------------------------------------------------------


def build(
    backend: str = "cpu",
    *,
    jobs: int | None = None,
    arch: str | None = None,
    defines: Sequence[str] = (),
    tests: bool = False,
    force: bool = False,
    root: Path | None = None,
) -> Build:
    """Build what is not built yet and return it; `defines` are CMake's `NAME=VALUE`, `arch` CUDA's, as in `80;90`."""
    if backend not in BACKENDS:
        raise LlamamemError(f"--backend {backend}: no such backend: use {' or '.join(BACKENDS)}")
    if arch and backend != "cuda":
        raise LlamamemError(f"--arch {arch}: is for --backend cuda alone")
    root = root or source_root()
    place = builds_dir(root) / f"{backend}-{_key(backend, arch, defines)}"
    place.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(place.parent / f".{place.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"llamamem: another build is at work in {place}: waiting for it", file=sys.stderr)
        lock.acquire()
    try:
        return _build(root, place, backend, jobs, arch, defines, tests, force)
    finally:
        lock.release()


def _key(backend: str, arch: str | None, defines: Sequence[str]) -> str:
    environment = [os.environ.get(name, "") for name in ("CC", "CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS", "CUDACXX")]
    return hashlib.sha256(json.dumps([backend, arch, sorted(defines), environment]).encode()).hexdigest()[:8]


def _build(
    root: Path,
    place: Path,
    backend: str,
    jobs: int | None,
    arch: str | None,
    defines: Sequence[str],
    tests: bool,
    force: bool,
) -> Build:
    vendor.materialise(root)
    identity = vendor.identity(root)
    made = Build(place, place / "bin", place / "bin", backend, identity)
    if force:
        shutil.rmtree(place, ignore_errors=True)
    note = _read(place / _NOTE) or {}
    # An edited tree has one identity through all its edits: ninja alone knows what is new in it.
    # So it does of the tests, which are no part of the identity.
    fresh = note.get("identity") == identity and not identity.endswith(EDITED) and not tests
    if fresh and all((place / "bin" / name).is_file() for name in PROGRAMS):
        print(f"llamamem: {backend} build {identity} is up to date: {place}", file=sys.stderr)
        return made
    tools.compilers()
    ninja = _configure(root, place, backend, arch, defines, tests)
    if (cpu := read_record(place / "bin")) and cpu.amx.startswith("left out"):
        print(f"llamamem: AMX is {cpu.amx} ({cpu.compiler}): quantised models run without it", file=sys.stderr)
    if (cuda := place / "llamamem-cuda.txt").is_file():
        print(f"llamamem: {cuda.read_text(encoding='utf-8').strip()}", file=sys.stderr)
    log = place / "build.log"
    (place / _NOTE).unlink(missing_ok=True)
    print(f"llamamem: {backend} build {identity}, log: {log}", file=sys.stderr)
    run_ninja([ninja, "-C", str(place), "-j", str(jobs or _cores())], log)
    said = ask_identity(place / "bin")
    if said not in (identity, vendor.identity(root)):  # a source that was saved meanwhile is in the build or is not
        raise LlamamemError(f"{place}: the new build reports {said}, expected {identity}: run `llamamem build --force`")
    text = json.dumps({"identity": said, "backend": backend, "tests": tests or note.get("tests", False)}, indent=2)
    (place / _NOTE).write_text(text + "\n", encoding="utf-8")
    return replace(made, identity=str(said))


def _configure(root: Path, place: Path, backend: str, arch: str | None, defines: Sequence[str], tests: bool) -> str:
    """Run CMake when its arguments are new; ninja, whose path is returned, runs it by itself for anything else."""
    seen = place / "llamamem-configure.json"
    before = _read(seen) or {}
    if before and before.get("source") != str(root):
        shutil.rmtree(place)  # the checkout was moved, and CMake's cache is full of the old place
        before = {}
    # The tools of last time, as long as they run: another version of CMake compiles everything again, and which one
    # comes first on PATH changes with every activated environment.
    cmake = before["cmake"] if tools.version(before.get("cmake", "")) else tools.cmake()
    ninja = before["ninja"] if tools.version(before.get("ninja", "")) else tools.ninja()
    arguments = [
        f"-DLLAMAMEM_BACKEND={backend}",
        f"-DLLAMAMEM_CUDA_ARCH={arch or ''}",
        f"-DLLAMAMEM_PYTHONPATH={Path(__file__).resolve().parents[2]}",
        "-DLLAMAMEM_EXACT_GELU_VARIANT=ON",
        f"-DCMAKE_MAKE_PROGRAM={ninja}",
        f"-DPython_EXECUTABLE={sys.executable}",
        *(f"-D{define}" for define in defines),
        *(["-DLLAMAMEM_TESTS=ON"] if tests else []),
    ]
    if not set(arguments) <= set(before.get("arguments", [])) or not (place / "build.ninja").is_file():
        place.mkdir(exist_ok=True)
        seen.unlink(missing_ok=True)
        run_cmake([cmake, "-S", str(root), "-B", str(place), "-G", "Ninja", *arguments], place / "configure.log")
        note = {"source": str(root), "cmake": cmake, "ninja": ninja, "arguments": arguments}
        seen.write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
    return ninja


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _read(path: Path) -> dict | None:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None
