"""The hostile sidecars in the tree are what their tool makes today."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from llamamem.formats.findings import REASONS

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "make_hostile_sidecars.py"
HOSTILE = ROOT / "tests" / "data" / "hostile"
BASE_OR_SIZE = {"unreadable", "too-large", "json-size", *(reason for reason in REASONS if reason.startswith("base-"))}


def test_corpus_is_what_the_tool_makes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, TOOL, tmp_path], check=True)
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    others = {HOSTILE / "README.md", *HOSTILE.glob("found-*.gguf")}
    kept = {path.name: path.read_bytes() for path in HOSTILE.iterdir() if path not in others}
    assert made.keys() == kept.keys()
    assert [name for name in made if made[name] != kept[name]] == []


def test_tool_removes_its_own_files_alone(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "cases.json").write_text('[{"file": "of-yesterday.gguf"}, {"file": "../above.gguf"}]')
    for path in (tmp_path / "above.gguf", folder / "found-1.gguf", folder / "of-yesterday.gguf"):
        path.write_bytes(b"mine")
    subprocess.run([sys.executable, TOOL, folder], check=True)
    assert (folder / "found-1.gguf").exists() and (tmp_path / "above.gguf").exists()
    assert not (folder / "of-yesterday.gguf").exists()


def test_tool_explains_itself(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, TOOL, "--help"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "tests/data/hostile" in done.stdout and not list(tmp_path.iterdir())


def test_corpus_has_a_file_for_each_reason_that_a_small_file_can_have() -> None:
    cases = json.loads((HOSTILE / "cases.json").read_text())
    assert {case["reason"] for case in cases if case["reason"]} == REASONS.keys() - BASE_OR_SIZE
    assert sum(path.stat().st_size for path in HOSTILE.glob("*.gguf")) < 6 << 20


def test_no_two_files_are_the_same() -> None:
    same = Counter(path.read_bytes() for path in HOSTILE.glob("*.gguf"))
    twice = {path.name for path in HOSTILE.glob("*.gguf") if same[path.read_bytes()] > 1}
    if twice:
        pytest.fail(f"the same bytes under several names: {sorted(twice)}")
