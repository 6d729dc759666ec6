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
HOSTILE = ROOT / "tests" / "data" / "hostile"
BASE_OR_SIZE = {"unreadable", "too-large", "json-size", *(reason for reason in REASONS if reason.startswith("base-"))}


def test_corpus_is_what_the_tool_makes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "tools" / "make_hostile_sidecars.py", tmp_path], check=True)
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    kept = {path.name: path.read_bytes() for path in HOSTILE.iterdir() if path.name != "README.md"}
    assert made.keys() == kept.keys()
    assert [name for name in made if made[name] != kept[name]] == []


def test_corpus_has_a_file_for_each_reason_that_a_small_file_can_have() -> None:
    cases = json.loads((HOSTILE / "cases.json").read_text())
    assert {case["reason"] for case in cases if case["reason"]} == REASONS.keys() - BASE_OR_SIZE
    assert sum(path.stat().st_size for path in HOSTILE.glob("*.gguf")) < 6 << 20


def test_no_two_files_are_the_same() -> None:
    same = Counter(path.read_bytes() for path in HOSTILE.glob("*.gguf"))
    twice = {path.name for path in HOSTILE.glob("*.gguf") if same[path.read_bytes()] > 1}
    if twice:
        pytest.fail(f"the same bytes under several names: {sorted(twice)}")
