"""Every file of tests/data/hostile through both readers: the same verdict for the same reason, in a clear line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamamem.formats.sidecar import validate_sidecar
from llamamem.native.runtime import loader_refusal

HOSTILE = Path(__file__).parents[1] / "data" / "hostile"
CASES = json.loads((HOSTILE / "cases.json").read_text())

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def runtime(product: Run) -> Callable[[Path], str | None]:
    """The runtime's own verdict on a file. A crash is an error of the one test whose file it was."""
    product(loader_refusal, HOSTILE / "sound-v1.gguf")  # without a build every test fails at once
    return lambda path: product(loader_refusal, path)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["file"].removesuffix(".gguf"))
def test_both_readers_say_the_same(case: dict[str, Any], runtime: Run, llamamem: Run) -> None:
    path, reason = HOSTILE / case["file"], case["reason"]
    found, refusal = validate_sidecar(path), runtime(path)
    command = llamamem("sidecar", "validate", path)
    if reason is None:
        assert (found.findings, refusal, command.status) == ((), None, 0)
        assert found.sidecar is not None
        return
    assert found.sidecar is None
    assert command.status == 2
    *lines, last = command.out.split("\n")
    assert last == ""
    assert all(line.startswith(f"{path}: [") for line in lines), "a line of a message is broken in two"
    for line, start in ((lines[0], f"{path}: "), (refusal, f"sidecar '{path}': ")):
        assert line.startswith(f"{start}[{reason}] ")
        assert line.isprintable()
        assert [name for name in case["names"] if name not in line.removeprefix(start)] == []
