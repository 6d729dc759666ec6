"""The help of `llamamem sidecar`: every verb is there, and says what its options and exit statuses mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

VERBS = {
    "export": ["--base", "--mmproj", "--config", "--checkpoint-repo", "--output", "--manifest", "--dtype"],
    "inspect": ["--json", "--tensors", "--memory-dir", "Exit status"],
    "validate": ["--base", "--runtime", "--json", "Exit status"],
    "materialize": ["--output", "--format", "--force"],
    "compare": ["--json", "Exit status"],
    "rebind": ["--base", "--output", "not proven", "llamamem smoke"],
    "zero": ["--output"],
}


@pytest.mark.parametrize("verb", VERBS)
def test_help(verb: str, llamamem: Callable[..., Any]) -> None:
    assert f" {verb} " in llamamem("sidecar", "--help").out
    result = llamamem("sidecar", verb, "--help")
    said = " ".join(result.out.split())
    assert result.status == 0 and all(word in said for word in VERBS[verb])
