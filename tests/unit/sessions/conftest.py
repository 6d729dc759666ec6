from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_memory_server import FakeServer, make_memory
from store_servers import RAM, SERVERS, NotHere, Server, emptied

from llamamem.serving.client import Client
from llamamem.sessions import Memory, Sessions, SessionStore, open_store

MakeStore = Callable[..., SessionStore]


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """In RAM where there is a disk of it: thousands of flushes are waited for here, and none of them is the test."""
    if not os.access(RAM, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=RAM, prefix="llamamem-test-") as path:
        yield Path(path)


@pytest.fixture(autouse=True)
def own_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data and run records of the user who runs the tests stay untouched and unread."""
    for name in ("XDG_STATE_HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    for name in ("LLAMAMEM_SESSIONS", "LLAMAMEM_SESSIONS_QUOTA", "LLAMA_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def servers() -> Iterator[Callable[[str], Server]]:
    """`servers("valkey")` is the one of that kind, which the first test starts."""
    running: dict[str, Server] = {}
    with contextlib.ExitStack() as stack:

        def started(kind: str) -> Server:
            if kind not in running:
                try:
                    running[kind] = stack.enter_context(SERVERS[kind](within=RAM))
                except NotHere as e:
                    (pytest.fail if os.environ.get("CI") else pytest.skip)(str(e))
            return running[kind]

        yield started


@pytest.fixture(params=["directory", "sqlite", "valkey", "postgres"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty store of each kind, as `open_store` takes it."""
    local = {"directory": str(tmp_path / "store"), "sqlite": f"sqlite:{tmp_path / 'store.db'}"}
    if request.param in local:
        return local[request.param]
    url: str = request.getfixturevalue("servers")(request.param).url
    emptied(url)
    return url


@pytest.fixture
def make_store(place: str) -> Iterator[MakeStore]:
    """`make_store(quota=...)` opens the same store each time."""
    with contextlib.ExitStack() as stack:

        def make(**kwargs: Any) -> SessionStore:
            store = open_store(place, **kwargs)
            stack.callback(store.close)
            return store

        yield make


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
