"""What a build and a run need, looked at one by one, each problem with its next step."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llamamem.errors import LlamamemError
from llamamem.formats.demo_files import demo_files
from llamamem.native import tools, vendor
from llamamem.native.build import builds, find_build
from llamamem.native.cpu import cpu_name, read_record
from llamamem.native.identity import patch_set_sha256, read_pin, series_names, source_root

__all__ = ["Finding", "examine"]


@dataclass(frozen=True)
class Finding:
    """One thing looked at; `hint` is the next step when it is not ok."""

    id: str
    ok: bool
    detail: str
    hint: str = ""


def examine() -> list[Finding]:
    """Every finding, in the order in which problems are best solved."""
    looks: list[tuple[str, Callable[[], Finding]]] = [
        ("python", _python),
        ("compiler", _compiler),
        ("cmake", lambda: _tool("cmake", tools.cmake)),
        ("ninja", lambda: _tool("ninja", tools.ninja)),
        ("git", _git),
        ("pin", _pin),
        ("patches", _patches),
        ("tree", _tree),
        ("build", _build),
        ("cpu", _cpu),
        ("bindings", _bindings),
        ("memory", _memory),
        ("cuda", _cuda),
    ]
    found = []
    for name, look in looks:
        try:
            found.append(look())
        except LlamamemError as error:
            problem, _, hint = str(error).rpartition(": ")
            found.append(Finding(name, False, problem or str(error), hint if problem else ""))
    return found


def _python() -> Finding:
    found = f"{platform.python_version()} ({sys.executable})"
    return Finding("python", True, found)  # an older one does not get as far as here


def _compiler() -> Finding:
    _, cxx = tools.compilers()
    return Finding("compiler", True, f"{cxx} {'.'.join(map(str, tools.version(cxx)))}")


def _tool(name: str, find: Callable[[], str]) -> Finding:
    path = find()
    return Finding(name, True, f"{path} {'.'.join(map(str, tools.version(path)))}")


def _git() -> Finding:
    path = shutil.which("git")
    if path is None:
        return Finding("git", False, "not on PATH", "install git: it lays the patches over the pinned llama.cpp")
    return Finding("git", True, f"{path} {'.'.join(map(str, tools.version(path)))}")


def _pin() -> Finding:
    pin = read_pin(source_root())
    return Finding("pin", True, f"llama.cpp {pin.upstream_commit[:9]} from {pin.requirement}")


def _patches() -> Finding:
    root = source_root()
    names = series_names(root / "patches")
    return Finding("patches", True, f"{len(names)} patches, set {patch_set_sha256(root)[:12]}")


def _tree() -> Finding:
    root = source_root()
    tree = vendor.tree_path(root)
    if not (tree / ".git").is_dir():
        packaged = root.name == "_source"  # a wheel brings its binaries, and needs the tree to build others alone
        return Finding("tree", packaged, f"{tree}: not made yet", "run `llamamem build`")
    if edited := vendor.edits(root):
        detail = f"{tree}: edits that no patch holds: {', '.join(edited[:5])}{', ...' if len(edited) > 5 else ''}"
        return Finding("tree", False, detail, "keep them with `llamamem vendor refresh`, or delete the tree")
    if vendor.is_stale(root):
        return Finding("tree", False, f"{tree}: made from another pin or series", "run `llamamem vendor apply`")
    return Finding("tree", True, f"{tree}: pin and series, no edits")


def _build() -> Finding:
    seen = "; ".join(f"{made.backend} {made.identity} in {made.root}" for made in builds()) or "none"
    try:
        chosen = find_build()
    except LlamamemError as error:
        problem, _, hint = str(error).rpartition(": ")
        return Finding("build", False, f"{problem} (found: {seen})", hint)
    return Finding("build", True, f"{chosen.backend} {chosen.identity} in {chosen.bin_dir}")


def _cpu() -> Finding:
    """What the build that would be used needs of this CPU; one that it lacks is refused where the build is found."""
    record = read_record(find_build().bin_dir)
    if record is None:
        return Finding("cpu", True, f"{cpu_name()}; the build does not say what it needs")
    needs = f"built by {record.compiler} for {' '.join(record.features) or 'any'}"
    return Finding("cpu", True, f"{cpu_name()}; {needs}" + (f"; AMX {record.amx}" if record.amx else ""))


def _bindings() -> Finding:
    pin = read_pin(source_root())
    spec = importlib.util.find_spec("llama_cpp")
    install = f"pip install --no-deps --no-binary llama-cpp-python {pin.requirement}"
    hint = f"run `make setup`, or: CMAKE_ARGS=-DLLAMA_BUILD=OFF {install}"
    if spec is None or not spec.submodule_search_locations:
        return Finding("bindings", False, "llama_cpp is not installed: parity, bench and sequence tests need it", hint)
    installed = importlib.metadata.version("llama_cpp_python")
    if installed != pin.requirement.partition("==")[2]:
        return Finding("bindings", False, f"llama_cpp is {installed}, the pin is {pin.requirement}", hint)
    stock = list((Path(next(iter(spec.submodule_search_locations))) / "lib").glob("*llama.*"))
    if stock:
        return Finding("bindings", False, f"llama_cpp brings a stock library of its own: {stock[0]}", hint)
    own = os.environ.get("LLAMA_CPP_LIB_PATH")
    try:
        loads = own or str(find_build().lib_dir)
    except LlamamemError:
        loads = "nothing until there is a build"
    origin = " (LLAMA_CPP_LIB_PATH is set: it wins outside the llamamem commands)" if own else ""
    return Finding("bindings", True, f"llama_cpp {installed}, loads {loads}{origin}")


def _memory() -> Finding:
    """Where the default build keeps a memory: the demo's, loaded with all layers on the GPU if there is one."""
    from llamamem.native import runtime  # the bindings may be missing

    files = demo_files()
    runtime.load_library()
    with (
        runtime.Model.open(files.model, files.sidecar) as model,
        runtime.Context(model, n_ctx=64) as context,
    ):
        context.feed([0])
        written = sum(state.n for state in context.states())
        layers = f"{len(model.layers)} layers of the demo model"
        where = f"{layers}: states on {', '.join(context.devices)}"
        hint = "a token was not written to each of them: run `llamamem build --force`"
        return Finding("memory", written == len(model.layers), where, hint)


def _cuda() -> Finding:
    """Never a problem by itself: `llamamem build --backend cuda` says exactly what it lacks."""
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    gpus = _output("nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader")
    toolkit = f"nvcc {'.'.join(map(str, _release(nvcc)))} ({nvcc})" if nvcc else "no nvcc"
    return Finding("cuda", True, f"{toolkit}; {'; '.join(gpus.splitlines()) or 'no GPU'}")


def _release(nvcc: str) -> tuple[str, ...]:
    words = _output(nvcc, "--version").partition("release ")[2]
    return tuple(words.partition(",")[0].split(".")) if words else ("?",)


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
