"""Gateways in this process, in front of a server of hashes and a store in memory."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import httpx
import pytest
from fake_llama import FakeLlama
from fronts import Front, MakeFront
from memory_store import MemoryStore

from llamamem.gateway import Gateway, Running, Settings, Upstream, listen
from llamamem.gateway.logs import Log


@pytest.fixture
def llama() -> Iterator[FakeLlama]:
    with FakeLlama() as llama:
        yield llama


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gateways look at the keys of their store more often than they do elsewhere."""
    monkeypatch.setattr("llamamem.gateway.app._LOOK", 0.2)


@pytest.fixture
def make_front(llama: FakeLlama) -> Iterator[MakeFront]:
    """`make_front(store, lease=1.0)`: another gateway on that store; members of Settings by name."""
    with ExitStack() as stack:
        yield partial(started, stack, llama)


@pytest.fixture
def front(make_front: MakeFront) -> Front:
    return make_front()


@pytest.fixture(scope="module")
def refusing() -> Iterator[Front]:
    """One for all the tests in which nothing comes of anything."""
    with FakeLlama() as llama, ExitStack() as stack:
        yield started(stack, llama)


def started(
    stack: ExitStack,
    llama: FakeLlama,
    store: MemoryStore | None = None,
    *,
    grace: float = 3.0,
    url: str | None = None,
    **settings: Any,
) -> Front:
    store, out = store or MemoryStore(), io.StringIO()
    gateway = Gateway(store, Upstream(url or llama.url), Settings(**settings), log=Log(out))
    running = stack.enter_context(Running(gateway, listen("127.0.0.1", 0), grace=grace))
    http = httpx.Client(base_url=f"http://127.0.0.1:{running.port}", timeout=20, trust_env=False)
    return Front(gateway, stack.enter_context(http), llama, store, out)
