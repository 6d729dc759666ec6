"""Gateways in this process, in front of a server of hashes and a store in memory."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import ExitStack
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


@pytest.fixture
def make_front(llama: FakeLlama) -> Iterator[MakeFront]:
    """`make_front(store, lease=1.0)`: another gateway on that store; members of Settings by name."""
    with ExitStack() as stack:

        def make(
            store: MemoryStore | None = None, *, grace: float = 3.0, url: str | None = None, **settings: Any
        ) -> Front:
            store, out = store or MemoryStore(), io.StringIO()
            gateway = Gateway(store, Upstream(url or llama.url), Settings(**settings), log=Log(out))
            running = stack.enter_context(Running(gateway, listen("127.0.0.1", 0), grace=grace))
            http = httpx.Client(base_url=f"http://127.0.0.1:{running.port}", timeout=20, trust_env=False)
            return Front(gateway, stack.enter_context(http), llama, store, out)

        yield make


@pytest.fixture
def front(make_front: MakeFront) -> Front:
    return make_front()
