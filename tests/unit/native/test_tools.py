from __future__ import annotations

from pathlib import Path

import pytest

from llamamem.errors import LlamamemError
from llamamem.native import tools


def program(folder: Path, name: str, says: str) -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH with nothing but this folder on it, and no programs from PyPI."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / "none"))
    monkeypatch.setitem(__import__("sys").modules, "cmake", None)
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_the_one_on_path_is_taken(only: Path) -> None:
    path = program(only, "cmake", "cmake version 3.25.1")
    assert tools.cmake() == str(path)
    assert tools.version(str(path)) == (3, 25, 1)


def test_one_that_is_too_old_is_named(only: Path) -> None:
    program(only, "cmake", "cmake version 3.10.2")
    with pytest.raises(LlamamemError, match=r"cmake 3.21 or newer was not found .*cmake is 3.10.2.*pip install cmake"):
        tools.cmake()


def test_none_at_all(only: Path) -> None:
    with pytest.raises(LlamamemError, match="not on PATH"):
        tools.cmake()
    with pytest.raises(LlamamemError, match=r"no CC compiler on PATH: install a C\+\+17 compiler"):
        tools.compilers()


def test_a_named_compiler_that_is_not_there(only: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(only, "cc", "cc 12.2.0")
    program(only, "c++", "c++ 12.2.0")
    assert tools.compilers() == (str(only / "cc"), str(only / "c++"))
    monkeypatch.setenv("CXX", "c++-99 -O1")
    with pytest.raises(LlamamemError, match=r"CXX=c\+\+-99: no such program"):
        tools.compilers()
