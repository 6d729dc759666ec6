"""README's tour, typed as printed."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import make_cli_docs
import pytest
from launched import until

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the checkout to write into, and `llamamem` on the path."""
    for name in ("tests", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    binary = tmp_path / "bin" / "llamamem"
    binary.parent.mkdir()
    binary.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m llamamem.cli "$@"\n')
    binary.chmod(0o755)
    monkeypatch.setenv("PATH", f"{binary.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.delenv("LLAMAMEM_SESSIONS", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def blocks() -> list[str]:
    tour = README.split("## A tour\n")[1].split("\n## ")[0]
    return re.findall(r"^```\n(.*?)^```", tour, re.MULTILINE | re.DOTALL)


def test_the_tour_goes_as_printed(home: Path) -> None:
    one, two = blocks()
    log = home / "first terminal"
    with log.open("w") as screen, subprocess.Popen(["bash", "-e", "-c", one], stderr=screen) as first:
        try:
            until(lambda: "ready at" in log.read_text() or first.poll() is not None)
            assert first.poll() is None, log.read_text()
            for command in two.splitlines():
                wanted = re.search(r"# exit status (\d)", command)
                done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=300)
                assert done.returncode == (int(wanted[1]) if wanted else 0), f"{command}\n{done.stdout}{done.stderr}"
                assert done.stdout + done.stderr != ""
                if "session list" in command:
                    assert "anna" in done.stdout
            assert first.wait(60) == 0
        finally:
            first.terminate()


def test_every_command_in_the_readme_is_one_with_these_options() -> None:
    known = {path: callback for path, callback, _ in make_cli_docs.commands()}
    text = make_cli_docs.document()
    used = re.findall(r"^(?:printf .* \| |\.venv/bin/)?(llamamem [^#\n]*)", README, re.MULTILINE)
    used += re.findall(r"`(llamamem [^`]*)`", README)
    assert len(used) > 20
    for line in used:
        words = line.split()
        path = next((" ".join(words[:n]) for n in (3, 2) if " ".join(words[:n]) in known), None)
        if path is None:
            assert re.search(rf"^### {re.escape(' '.join(words[:2]))}\b", text, re.MULTILINE) or "--" in line, line
            continue
        section = text.split(f"### {path}\n")[1].split("\n### ")[0]
        ours = line.split(" -- ")[0]  # the rest is for llama-server
        for option in re.findall(r"(?<!\S)--[a-z-]+(?=\s|$|`|,)", ours):
            assert option in section, f"{line}: {option}"
