from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_memory_server import FakeServer, make_memory

from llamamem.serving.client import Client
from llamamem.sessions import DirectoryStore, Memory, Sessions, SessionStore, SqliteStore

MakeStore = Callable[..., SessionStore]


@pytest.fixture(autouse=True)
def own_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data and run records of the user who runs the tests stay untouched and unread."""
    for name in ("XDG_STATE_HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    for name in ("LLAMAMEM_SESSIONS", "LLAMAMEM_SESSIONS_QUOTA", "LLAMA_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(params=["directory", "sqlite"])
def make_store(request: pytest.FixtureRequest, tmp_path: Path) -> MakeStore:
    """`make_store(quota=...)` opens the same store each time."""
    if request.param == "directory":
        return lambda **kwargs: DirectoryStore(tmp_path / "store", **kwargs)
    return lambda **kwargs: SqliteStore(tmp_path / "store.db", **kwargs)


@pytest.fixture
def store(make_store: MakeStore) -> SessionStore:
    return make_store()


@pytest.fixture
def memory() -> Callable[..., Memory]:
    """`memory(tokens, value)`: a memory of the fake server's model."""
    return make_memory


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FakeServer]:
    slot_dir = tmp_path / "slots"
    slot_dir.mkdir()
    with FakeServer(slot_dir) as running:
        yield running


@pytest.fixture
def sessions(server: FakeServer, store: SessionStore) -> Iterator[Sessions]:
    with Client(server.url, timeout=5) as client:
        yield Sessions(client, store, wait=10)
