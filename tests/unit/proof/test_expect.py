"""Each expectation: when it holds, and what is said when it does not."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from llamamem.formats.suite import Expect
from llamamem.proof.expect import failures

AGE = {"type": "object", "required": ["age"], "properties": {"age": {"type": "integer"}}}


@pytest.mark.parametrize(
    "expect, holds, fails",
    [
        ({"exact": "green"}, " green\n", "Green"),
        ({"exact": "Green", "ignore_case": True}, "gREEN", "green."),
        ({"contains": "Lima"}, "It is Lima Four.", "It is lima four."),
        ({"contains": ["a", "b"]}, "ba", "a"),
        ({"contains": "STRASSE", "ignore_case": True}, "Stra\u00dfe", "Gasse"),
        ({"not_contains": ["7391"]}, "not told", "It is 7391."),
        ({"not_contains": "Secret", "ignore_case": True}, "nothing", "a SECRET"),
        ({"regex": r"\A- goat\n- mule\Z"}, "- goat\n- mule\n", "- mule\n- goat"),
        ({"regex": "^no\\b", "ignore_case": True}, "No, because", "Note that"),
        ({"json_schema": AGE}, ' {"age": 3} ', '{"age": "3"}'),
        ({"json_schema": AGE}, '{"age": 3}', '```json\n{"age": 3}\n```'),
        ({"json_schema": {}}, '{"age": 3}', '{"age": NaN}'),
        ({"json_schema": {"$ref": "#/$defs/n", "$defs": {"n": {"type": "integer"}}}}, "3", "null"),
        ({"contains": "a", "not_contains": "b"}, "a", "ab"),
    ],
)
def test_expectations(expect: dict[str, Any], holds: str, fails: str) -> None:
    assert failures(Expect(**expect), holds) == ()
    assert len(failures(Expect(**expect), fails)) == 1


def test_every_failure_is_told() -> None:
    found = failures(Expect(exact="a", contains=["b", "c"], not_contains="d", regex="e", json_schema={}), "d")
    assert [line.partition(":")[0] for line in found] == [
        *("exact", "contains", "contains", "not_contains", "regex", "json_schema"),
    ]
    assert "$.age" in failures(Expect(json_schema=AGE), '{"age": "x"}')[0]


def test_a_schema_is_never_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_up: list[Any] = []

    def refuse(*address: Any, **_: Any) -> Any:
        looked_up.append(address)
        raise OSError("no network here")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    (found,) = failures(Expect(json_schema={"$ref": "http://127.0.0.1:9/schema.json"}), "{}")
    assert "not in the schema" in found and not looked_up


def test_an_answer_nested_without_end_is_no_crash() -> None:
    (found,) = failures(Expect(json_schema={}), "[" * 100_000)
    assert "not JSON" in found
