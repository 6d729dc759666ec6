"""The recall table, against a server that remembers perfectly, one that does not, and one that mixes memories up."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from llamamem.proof.recall import ALLOWED, RecallReport, Row, bars, recall

Result = Any


class FakeClient:
    """Answers from what was told in the request and from the memory in it. `kind` is what is wrong with it."""

    def __init__(self, kind: str = "remembers") -> None:
        self.kind, self.url = kind, "http://fake"
        self.known: dict[str, str] = {}

    def chat(self, messages: list[dict[str, str]], **kwargs: Any) -> dict[str, Any]:
        assert kwargs["cache_prompt"] is False and "id_slot" not in kwargs
        setting = kwargs["rwkv_ms"]
        if self.kind != "mixes memories up":
            self.known = {} if setting["memory"] is None else json.loads(base64.b64decode(setting["memory"]))
        for message in messages:
            for name, surname in re.findall(r"(?:this is|here is|i met|remember) (\w+) (\w+)\.", message["content"]):
                self.known[name] = surname
        asked = re.match(r"who is (\w+)\?", messages[-1]["content"])
        said = f"that is {asked.group(1)} {self.known.get(asked.group(1), 'nobody')}." if asked else "ok."
        kept = json.dumps({} if self.kind == "forgets" else self.known).ljust(1000).encode()
        memory = {"memory": base64.b64encode(kept).decode()} if setting.get("return_memory") else {}
        return {"choices": [{"message": {"content": said}}], "rwkv_ms": memory}


def measure(kind: str) -> RecallReport:
    return recall(FakeClient(kind), rows=((8, 64),), episodes=20)  # type: ignore[arg-type]


def test_a_server_that_remembers_passes() -> None:
    report = measure("remembers")
    (row,) = report.rows
    assert (row.questions, row.memory, row.none) == (160, 1.0, 0.0)
    assert row.foreign <= ALLOWED and report.ok and report.memory_bytes == 1000


def test_a_server_that_forgets_fails() -> None:
    assert not measure("forgets").ok


def test_a_server_that_gives_one_the_memory_of_another_fails() -> None:
    report = measure("mixes memories up")
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
