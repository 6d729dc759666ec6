"""JSON of somebody else's file, within the bounds of docs/sidecar.md: size, depth, no member twice, no NaN."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from llamamem.errors import LlamamemError
from llamamem.formats.findings import quoted

MAX_JSON = 16 << 20  # bytes
MAX_DEPTH = 8

_LONE_SURROGATE = re.compile(r"\\u[dD][89abAB]..(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB]..)\\u[dD][c-fC-F]")


def parse_json(where: str, text: str) -> Any:
    """JSON within the bounds of docs/sidecar.md. `where` names the text in errors."""
    data = text.encode("utf-8", "replace")
    if len(data) > MAX_JSON:
        raise LlamamemError(f"{where}: {len(data)} bytes of JSON, at most {MAX_JSON} are read", reason="json-size")
    if _is_deep(data):
        raise LlamamemError(f"{where}: JSON is nested deeper than {MAX_DEPTH} levels", reason="json-depth")
    twice: list[str] = []

    def members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs) and not twice:
            seen: set[str] = set()
            for name, _ in pairs:
                if name in seen:
                    twice.append(name)
                seen.add(name)
        return result

    try:
        value = json.loads(
            text, object_pairs_hook=members, parse_int=_integer, parse_float=_real, parse_constant=_constant
        )
    except (ValueError, RecursionError) as e:
        at = f" ({e.msg} at character {e.pos})" if isinstance(e, json.JSONDecodeError) else ""
        raise LlamamemError(f"{where}: not valid JSON{at}", reason="json-invalid") from None
    # of an escaped backslash nothing is left that could look like the escape of a surrogate
    if _LONE_SURROGATE.search(text.replace("\\\\", "__")):
        raise LlamamemError(f"{where}: not valid JSON (half a surrogate pair)", reason="json-invalid")
    if twice:
        raise LlamamemError(f"{where}: member {quoted(twice[0])} is there twice", reason="json-duplicate")
    return value


def _is_deep(data: bytes) -> bool:
    """Counts brackets outside of strings: a parser must not be trusted with the depth before that is known."""
    depth, inside, escaped = 0, False, False
    for byte in data:
        if inside:
            if escaped:
                escaped = False
            elif byte == 0x5C:  # backslash
                escaped = True
            elif byte == 0x22:  # quotation mark
                inside = False
        elif byte == 0x22:
            inside = True
        elif byte in b"[{":
            depth += 1
            if depth > MAX_DEPTH:
                return True
        elif byte in b"]}":
            depth -= 1
    return False


def _integer(text: str) -> int | float:
    """An integer of 64 bits, signed or unsigned; what does not fit is a float, as in the runtime."""
    if len(text) <= 20 and -(1 << 63) <= int(text) < 1 << 64:
        return int(text)
    return _real(text)


def _real(text: str) -> float:
    if math.isinf(value := float(text)):
        raise ValueError(f"{text[:20]}... is too large")
    return value


def _constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")
