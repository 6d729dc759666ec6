"""docs/json.md as something that an output can be held against."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[1] / "docs" / "json.md"
_TYPES = {"string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,), "null": (type(None),)}
_MISSING = ", may be missing"
_WITHOUT = re.compile(r", without `(\w+)`")

Fields = dict[str, str]  # "checks[].id": "string or null"


def sections() -> dict[str, Fields]:
    """By heading: the tables of the page, with shapes in place of their names."""
    found: dict[str, Fields] = {}
    for part in re.split(r"^##+ ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        rows = re.findall(r"^\| (?:`([^`|]+)`|\*(all)\*) \| ([^|]+?) \|", part, re.MULTILINE)
        if rows:
            found[part.split("\n")[0].strip()] = {field: kind for field, _, kind in rows}
    return {heading: _whole(fields, found) for heading, fields in found.items()}


def _whole(fields: Fields, shapes: dict[str, Fields]) -> Fields:
    whole: Fields = {}
    for field, said in fields.items():
        kind, missing = said.removesuffix(_MISSING), said.endswith(_MISSING)
        left_out = _WITHOUT.search(kind)
        names = _WITHOUT.sub("", kind).split(" or ")
        if names[0] not in shapes:
            whole[field] = said
            continue
        for member, of_it in _whole(shapes[names[0]], shapes).items():
            if left_out is None or member != left_out[1]:
                whole[f"{field}.{member}".lstrip(".")] = of_it + (_MISSING if missing else "")
        if "null" in names:
            whole[field] = "null"
    return whole


def faults(outputs: list[Any], fields: Fields) -> list[str]:
    """How these outputs of one command are not as documented."""
    seen: set[str] = set()
    found = [fault for output in outputs for fault in _walk(output, "", fields, seen)]
    may = {field for field, kind in fields.items() if kind.endswith(_MISSING) or kind == "null"}
    return found + [f"{field}: documented, and never there" for field in fields if field not in seen | may]


def _walk(value: Any, path: str, fields: Fields, seen: set[str]) -> list[str]:
    kinds = fields.get(path, "").removesuffix(_MISSING).split(" or ")
    seen.add(path)
    if "any" in kinds or ("object" in kinds and isinstance(value, dict | list)):
        return []
    if isinstance(value, dict):
        return [f for name, v in value.items() for f in _walk(v, f"{path}.{name}".lstrip("."), fields, seen)]
    if isinstance(value, list):
        # an empty one shows nothing of its items
        seen |= set() if value else {field for field in fields if field.startswith(f"{path}[]")}
        return [f for v in value for f in _walk(v, f"{path}[]", fields, seen)]
    if value is None:  # so does what is not there of its members
        seen |= {field for field in fields if field.startswith(f"{path}.")}
    if path not in fields:
        return [f"{path}: not documented ({value!r})"]
    if isinstance(value, bool):  # which Python counts among the integers
        if "boolean" in kinds:
            return []
    elif any(isinstance(value, _TYPES.get(kind, ())) for kind in kinds):
        return []
    return [f"{path}: documented as {fields[path]}, was {value!r}"]
