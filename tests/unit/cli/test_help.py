"""Every command's help page: it is there, fits a terminal, and says what each option and exit status means."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import make_cli_docs
import pytest

COMMANDS = {path: callback for path, callback, _ in make_cli_docs.commands()}
LOOSE = ("llamamem", "llamamem sidecar", "llamamem session", "llamamem state", "llamamem lab")


@pytest.mark.parametrize("path", [*LOOSE, *COMMANDS])
def test_its_page_fits_80_columns(path: str, llamamem: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    result = llamamem(*path.split()[1:], "--help")
    assert result.status == 0 and result.err == ""
    assert all(len(line.rstrip()) <= 80 for line in result.out.splitlines()) and "\x1b" not in result.out
    assert f"Usage: {path} " in result.out and ("Exit" in result.out or path in LOOSE[1:])


@pytest.mark.parametrize("path", COMMANDS)
def test_it_says_what_exit_statuses_and_options_mean(path: str) -> None:
    callback = COMMANDS[path]
    said = inspect.getdoc(callback) or ""
    first = said.split("\n")[0]
    assert re.search(r"[.?]$", first) and len(first) <= 110, "the line that the list of commands shows"
    assert re.search(r"Exit status: (0|2)\b", said), "what a script may rely on"
    for parameter, _, info in make_cli_docs.parameters(callback):
        assert re.search(r"[.:)\]]$", str(info.help)), f"{parameter.name}: {info.help!r}"


def test_docs_cli_md_is_current(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = make_cli_docs.DOCS.read_text(encoding="utf-8")
    assert text == make_cli_docs.document(), "run tools/make_cli_docs.py"
    assert all(f"### {path}\n" in text for path in COMMANDS)
    stale = tmp_path / "cli.md"
    stale.write_text(text.replace("--json", "--yaml"))
    monkeypatch.setattr(make_cli_docs, "DOCS", stale)
    monkeypatch.setattr("sys.argv", ["make_cli_docs.py", "--check"])
    assert make_cli_docs.main() == 1
    monkeypatch.setattr("sys.argv", ["make_cli_docs.py"])
    assert make_cli_docs.main() == 0 and stale.read_text(encoding="utf-8") == text
