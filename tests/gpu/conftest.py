"""What was measured is printed in one block at the end, worth pasting."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from shutil import which

import pytest

_MEASURED: list[str] = []


@pytest.fixture
def measured() -> Callable[[str], None]:
    """`measured("logits ...")`: a line of the block."""
    return _MEASURED.append


@pytest.fixture(scope="session")
def gpu() -> str:
    """The first GPU's name; without one, skips."""
    smi = which("nvidia-smi")
    query = ["--query-gpu=name,driver_version", "--format=csv,noheader"]
    found = subprocess.run([smi, *query], capture_output=True, text=True, check=False) if smi else None
    if found is None or found.returncode != 0 or not found.stdout.strip():
        pytest.skip("no GPU on this machine")
    return found.stdout.splitlines()[0]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _MEASURED:
        terminalreporter.section("on the GPU")
        for line in _MEASURED:
            terminalreporter.write_line(line)
