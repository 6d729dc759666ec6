"""What is expected of an answer, held against it."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import referencing
from referencing.exceptions import Unresolvable

from llamamem.formats.suite import Expect


def failures(expect: Expect, answer: str) -> tuple[str, ...]:
    """Why the answer is not as expected, one line for each check that fails; empty when all hold."""
    text = answer.strip()

    def folded(value: str) -> str:
        return value.casefold() if expect.ignore_case else value

    found = []
    if expect.exact is not None and folded(text) != folded(expect.exact.strip()):
        found.append(f"exact: is not {expect.exact.strip()!r}")
    found += [f"contains: no {part!r} in it" for part in expect.contains if folded(part) not in folded(text)]
    found += [f"not_contains: {part!r} is in it" for part in expect.not_contains if folded(part) in folded(text)]
    if expect.regex is not None and not re.search(expect.regex, text, re.IGNORECASE if expect.ignore_case else 0):
        found.append(f"regex: {expect.regex!r} is not found")
    if expect.json_schema is not None and (fault := _schema_fault(expect.json_schema, text)):
        found.append(f"json_schema: {fault}")
    return tuple(found)


def _schema_fault(schema: dict[str, Any], text: str) -> str | None:
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as e:
        return f"the answer is not JSON ({e})"
    # An empty registry: a schema is looked up nowhere but in itself, on no network.
    validator = jsonschema.validators.validator_for(schema)(schema, registry=referencing.Registry())
    try:
        fault = jsonschema.exceptions.best_match(validator.iter_errors(value))
    except Unresolvable as e:
        return f"refers to {e.ref}, which is not in the schema"
    return None if fault is None else f"{fault.json_path}: {fault.message}"


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
