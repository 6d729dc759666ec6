"""Suites: what a line may be, and how a faulty one is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llamamem.errors import LlamamemError
from llamamem.formats.suite import read_suite


def suite_file(tmp_path: Path, *lines: Any, name: str = "suite.jsonl") -> Path:
    path = tmp_path / name
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines) + "\n", encoding="utf-8")
    return path


def test_json_lines(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    suite = read_suite(
        suite_file(
            tmp_path,
            {"id": "one", "prompt": "hello", "expect": {"contains": "x", "not_contains": ["y", "z"]}},
            "",
            {"id": "two", "messages": turns, "group": "g", "max_tokens": 9},
        )
    )
    one, two = suite.lines
    assert one.conversation() == [{"role": "user", "content": "hello"}]
    assert one.expect is not None and one.expect.contains == ("x",) and one.expect.not_contains == ("y", "z")
    assert (two.conversation(), two.group, two.max_tokens, two.expect) == (turns, "g", 9, None)
    assert [line.id for line in suite.first(1).lines] == ["one"]


def test_plain_text_is_one_prompt_a_line(tmp_path: Path) -> None:
    suite = read_suite(suite_file(tmp_path, "first ", "", "second\u2028half\r", name="suite.txt"))
    assert [(line.id, line.prompt) for line in suite.lines] == [("line-1", "first "), ("line-3", "second\u2028half")]


@pytest.mark.parametrize(
    "name, as_json", [("s.jsonl", True), ("s.json", True), ("s", True), ("s.txt", False), ("s.TXT", False)]
)
def test_which_of_the_two(tmp_path: Path, name: str, as_json: bool) -> None:
    (line,) = read_suite(suite_file(tmp_path, {"id": "one", "prompt": "hello"}, name=name)).lines
    assert (line.prompt == "hello") is as_json


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "suite.txt"
    path.write_bytes(b"\xef\xbb\xbfhello")
    assert read_suite(path).lines[0].prompt == "hello"


def test_the_system_prompt_does_not_replace_a_line_s_own(tmp_path: Path) -> None:
    own = [{"role": "system", "content": "own"}, {"role": "user", "content": "a"}]
    without, with_own = read_suite(suite_file(tmp_path, {"id": "1", "prompt": "a"}, {"id": "2", "messages": own})).lines
    assert without.conversation("given")[0] == {"role": "system", "content": "given"}
    assert with_own.conversation("given") == own


def user(content: str = "a") -> dict[str, str]:
    return {"role": "user", "content": content}


@pytest.mark.parametrize(
    "line, said",
    [
        ("{", "line 2"),
        ("[]", "line 2"),
        ({"prompt": "a"}, "id"),
        ({"id": "x"}, "either prompt or messages"),
        ({"id": "x", "prompt": ""}, "prompt"),
        ({"id": "x", "prompt": "a", "messages": [user()]}, "either prompt or messages"),
        ({"id": "x", "messages": []}, "messages"),
        ({"id": "x", "messages": [user(), {"role": "assistant", "content": "b"}]}, "the last one is the assistant's"),
        ({"id": "x", "messages": [{"role": "tool", "content": "b"}]}, "messages.0.role"),
        ({"id": "x", "prompt": "a", "expects": {"exact": "b"}}, "expects"),
        ({"id": "x", "prompt": "a", "expect": {"contain": "b"}}, "expect.contain"),
        ({"id": "x", "prompt": "a", "expect": {"ignore_case": True}}, "checks nothing"),
        ({"id": "x", "prompt": "a", "expect": {"regex": "("}}, "not a regular expression"),
        ({"id": "x", "prompt": "a", "expect": {"json_schema": {"type": "text"}}}, "not a JSON schema"),
        ({"id": "x", "prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"id": "first", "prompt": "a"}, "'first' is that of line 1"),
    ],
)
def test_a_faulty_line_is_named(tmp_path: Path, line: Any, said: str) -> None:
    path = suite_file(tmp_path, {"id": "first", "prompt": "a"}, line)
    with pytest.raises(LlamamemError) as refused:
        read_suite(path)
    assert "line 2" in str(refused.value) and said in str(refused.value) and str(path) in str(refused.value)


@pytest.mark.parametrize("data, said", [(b"", "empty"), (b"\n \n", "empty"), (b"a\xff", "byte 1")])
def test_a_faulty_file_is_named(tmp_path: Path, data: bytes, said: str) -> None:
    path = tmp_path / "suite.txt"
    path.write_bytes(data)
    with pytest.raises(LlamamemError, match=said):
        read_suite(path)
    with pytest.raises(LlamamemError, match=r"none\.txt: cannot be read"):
        read_suite(tmp_path / "none.txt")
