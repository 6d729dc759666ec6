from __future__ import annotations

import sys
from pathlib import Path

import pytest

from llamamem.native import vendor


@pytest.fixture(scope="session")
def identity() -> str:
    return vendor.identity()


@pytest.fixture
def fake_bin(tmp_path: Path, identity: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bin directory whose llama-server is the stand-in; it claims to be the build that is asked for."""
    directory = tmp_path / "bin"
    directory.mkdir()
    binary = directory / "llama-server"
    source = Path(__file__).with_name("fake_llama_server.py").read_text(encoding="utf-8")
    binary.write_text(f"#!{sys.executable}\n{source}", encoding="utf-8")
    binary.chmod(0o755)
    monkeypatch.setenv("FAKE_IDENTITY", identity)
    monkeypatch.setenv("FAKE_STARTED", str(tmp_path / "started"))
    monkeypatch.setenv("FAKE_GATE", str(tmp_path / "gate"))
    return directory


@pytest.fixture(autouse=True)
def own_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """State, cache and configuration of the user who runs the tests stay untouched and unread."""
    for name in ("XDG_STATE_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The smallest GGUF: no keys, no tensors."""
    path = tmp_path / "base.gguf"
    path.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + bytes(16))
    return path
