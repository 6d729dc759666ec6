from __future__ import annotations

import sys
from pathlib import Path

import pytest


@pytest.fixture
def fake_bin(tmp_path: Path) -> Path:
    """A bin directory whose llama-server is the stand-in."""
    directory = tmp_path / "bin"
    directory.mkdir()
    binary = directory / "llama-server"
    source = Path(__file__).with_name("fake_llama_server.py").read_text(encoding="utf-8")
    binary.write_text(f"#!{sys.executable}\n{source}", encoding="utf-8")
    binary.chmod(0o755)
    return directory


@pytest.fixture(autouse=True)
def own_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """State, cache and configuration of the user who runs the tests stay untouched and unread."""
    for name in ("XDG_STATE_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
