"""The recall table, against a server that remembers perfectly, one that does not, and one that mixes memories up."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamamem.proof.recall import ALLOWED, RecallReport, Row, bars, recall

Result = Any


class FakeClient:
    """Answers from what was told in the slot, or from the file that was restored. `kind` is what is wrong with it."""

    def __init__(self, folder: Path, kind: str = "remembers") -> None:
        self.folder, self.kind = folder, kind
        self.known: dict[str, str] = {}
        self.files: dict[str, dict[str, str]] = {}

    def erase_slot(self, slot: int) -> None:
        if self.kind != "never erases":
            self.known = {}

    def save_memory(self, slot: int, name: str) -> None:
        self.files[name] = {} if self.kind == "forgets" else dict(self.known)
        (self.folder / name).write_bytes(bytes(100))

    def restore_memory(self, slot: int, name: str) -> None:
        assert (self.folder / name).exists()
        self.known = dict(self.files[name])

    def chat(self, messages: list[dict[str, str]], **kwargs: Any) -> dict[str, Any]:
        assert kwargs["cache_prompt"] is False
        for message in messages:
            for name, surname in re.findall(r"(?:this is|here is|i met|remember) (\w+) (\w+)\.", message["content"]):
                self.known[name] = surname
        asked = re.match(r"who is (\w+)\?", messages[-1]["content"])
        said = f"that is {asked.group(1)} {self.known.get(asked.group(1), 'nobody')}." if asked else "ok."
        return {"choices": [{"message": {"content": said}}]}


def measure(folder: Path, kind: str) -> RecallReport:
    return recall(FakeClient(folder, kind), folder, rows=((8, 64),), episodes=20)  # type: ignore[arg-type]


def test_a_server_that_remembers_passes_and_leaves_no_file(tmp_path: Path) -> None:
    report = measure(tmp_path, "remembers")
    (row,) = report.rows
    assert (row.questions, row.memory, row.none) == (160, 1.0, 0.0)
    assert row.foreign <= ALLOWED and report.ok and report.memory_bytes == 100
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_forgets_fails(tmp_path: Path) -> None:
    assert not measure(tmp_path, "forgets").ok


def test_a_server_that_remembers_without_its_memory_fails(tmp_path: Path) -> None:
    report = measure(tmp_path, "never erases")
    assert report.rows[0].none > ALLOWED and not report.ok


@pytest.mark.parametrize(
    ("memory", "none", "foreign", "ok"),
    [(0.95, 0.09, 0.09, True), (0.94, 0.0, 0.0, False), (1.0, 0.1, 0.0, False), (1.0, 0.0, 0.1, False)],
)
def test_what_is_promised(memory: float, none: float, foreign: float, ok: bool) -> None:
    assert Row(8, 64, 200, 1600, memory, none, foreign).ok is ok


def test_a_few_episodes_are_held_to_what_they_can_tell() -> None:
    assert Row(8, 64, 10, 80, 0.94, 0.0, 0.1).ok and Row(1, 64, 10, 10, 1.0, 0.1, 0.0).ok
    assert not Row(8, 64, 10, 80, 0.85, 0.0, 0.0).ok and not Row(8, 64, 10, 80, 1.0, 0.3, 0.0).ok


def test_bars_are_as_long_as_the_shares() -> None:
    (with_it, without) = bars(RecallReport((Row(4, 64, 10, 40, 0.5, 0.25, 0.0),), 6492), width=8)
    assert with_it.count("█") == 4 and without.count("░") == 2


@pytest.mark.parametrize("rows", ["8", "8:x", "0:64", "25:64", "4:99999", ""])
def test_rows_that_cannot_be_are_refused(llamamem: Callable[..., Result], rows: str) -> None:
    result = llamamem("recall", "--rows", rows)
    assert result.status == 2 and "--rows" in result.err
