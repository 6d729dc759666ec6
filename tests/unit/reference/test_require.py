"""Without PyTorch everything works but the reference, which says in one line what to install."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from llamamem.reference import require


@pytest.mark.parametrize(
    "command",
    [
        ("reference", "run", "hello"),
        ("reference", "trace", "hello", "--adapter", "a", "--output", "t.json"),
        ("reference", "parity", "--base", "b", "--model", "m", "--sidecar", "s"),
        ("fixture", "check", "x.npz", "--engine", "torch"),
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_a_command_says_what_is_missing(llamamem: Any, monkeypatch: pytest.MonkeyPatch, command: Any) -> None:
    monkeypatch.setattr(require, "find_spec", lambda name: None)
    done = llamamem(*command)
    assert done.status == 2 and done.out == ""
    assert (
        "needs torch and transformers: run `pip install -e '.[reference]'` in" in done.err and done.err.count("\n") == 1
    )


def test_the_command_line_does_not_import_torch() -> None:
    code = "import sys, llamamem.cli; sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
