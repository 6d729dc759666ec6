from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from llamamem.native import doctor


@pytest.fixture
def examined(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(doctor, "source_root", lambda: root)
    return root


def checks(result) -> dict[str, dict]:
    return {check["id"]: check for check in json.loads(result.out)["checks"]}


def test_a_fresh_checkout_is_told_to_build(examined: Path, llamamem) -> None:
    result = llamamem("doctor", "--json")
    assert result.status == 1
    found = checks(result)
    assert found["git"]["ok"] and found["python"]["ok"]
    assert not found["tree"]["ok"] and "llamamem build" in found["tree"]["hint"]
    assert not found["build"]["ok"] and "llamamem build" in found["build"]["hint"]
    assert found["pin"]["detail"] == "llama.cpp 012345678 from pkg==1.0"


def test_an_edited_tree_is_a_problem_with_a_next_step(examined: Path, tree: Path, llamamem) -> None:
    assert checks(llamamem("doctor", "--json"))["tree"]["ok"]
    (tree / "README.md").write_text("edited\n")
    found = checks(llamamem("doctor", "--json"))["tree"]
    assert not found["ok"] and "README.md" in found["detail"] and "refresh" in found["hint"]


def test_a_missing_program_is_named(examined: Path, llamamem, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = os.environ["PATH"]
    for name in ("git",):
        found = next(Path(folder) / name for folder in real.split(os.pathsep) if (Path(folder) / name).exists())
        (tmp_path / name).symlink_to(found)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    result = llamamem("doctor")
    assert result.status == 1
    lines = result.out.splitlines()
    problem = next(n for n, line in enumerate(lines) if line.startswith("FAIL compiler"))
    assert "no CC compiler on PATH" in lines[problem]
    assert "next: install a C++17 compiler" in lines[problem + 1]
