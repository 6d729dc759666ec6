"""The programs a build needs: those on PATH, else those that came with our own dependencies from PyPI."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

from llamamem.errors import LlamamemError

__all__ = ["CMAKE_OLDEST", "cmake", "compilers", "ninja", "version"]

CMAKE_OLDEST = (3, 21)


def version(program: str) -> tuple[int, ...]:
    """The first dotted number that `PROGRAM --version` prints, `()` when it does not run."""
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    found = re.search(r"\d+(\.\d+)+", done.stdout + done.stderr) if done.returncode == 0 else None
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def _find(name: str, folder_attribute: str, oldest: tuple[int, ...]) -> str:
    candidates = [shutil.which(name), shutil.which(name, path=sysconfig.get_path("scripts"))]
    try:
        candidates.append(str(Path(getattr(importlib.import_module(name), folder_attribute)) / name))
    except (ImportError, AttributeError):
        pass
    seen = []
    for candidate in candidates:
        if candidate and (found := version(candidate)):
            if found >= oldest:
                return candidate
            seen.append(f"{candidate} is {'.'.join(map(str, found))}")
    wanted = f"{name} {'.'.join(map(str, oldest))} or newer" if oldest else name
    raise LlamamemError(f"{wanted} was not found ({'; '.join(seen) or 'not on PATH'}): run `pip install {name}`")


def cmake() -> str:
    return _find("cmake", "CMAKE_BIN_DIR", CMAKE_OLDEST)


def ninja() -> str:
    return _find("ninja", "BIN_DIR", ())


def compilers() -> tuple[str, str]:
    """The C and the C++ compiler that CMake will take: `CC` and `CXX`, else the usual names."""
    found = []
    for variable, names in (("CC", ("cc", "gcc", "clang")), ("CXX", ("c++", "g++", "clang++"))):
        named = os.environ.get(variable, "").split()
        path = next((path for name in (named[:1] or names) if (path := shutil.which(name))), None)
        if path is None:
            what = f"{variable}={named[0]}: no such program" if named else f"no {variable} compiler on PATH"
            raise LlamamemError(f"{what}: install a C++17 compiler (g++ 9 or clang 10, or newer)")
        found.append(path)
    return found[0], found[1]
