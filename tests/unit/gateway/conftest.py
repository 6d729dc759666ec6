"""Gateways in this process, in front of a server of hashes and a store in memory."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from fake_llama import FakeLlama
from memory_store import MemoryStore

from llamamem.gateway import Gateway, Running, Settings, Upstream, listen
from llamamem.gateway.logs import Log


@dataclass
class Front:
    """A gateway, a client of it, what it is in front of, and its log."""

    gateway: Gateway
    http: httpx.Client
    llama: FakeLlama
    store: MemoryStore
    out: io.StringIO = field(default_factory=io.StringIO)

    def chat(self, *said: str, name: str | None = "anna", **options: Any) -> httpx.Response:
        """Turns by turns, the user first. `headers` are more of them; all else is of the body."""
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(said)]
        headers = {"X-Session-Id": name} if name is not None else {}
        headers |= options.pop("headers", {})
        path = options.pop("path", "/v1/chat/completions")
        return self.http.post(path, json={"messages": messages, "max_tokens": 6, **options}, headers=headers)

    def told(self, *said: str, **options: Any) -> dict[str, Any]:
        """What the answer tells of the session, with its text."""
        response = self.chat(*said, **options)
        assert response.status_code == 200, response.text
        body = response.json()
        return {**body["rwkv_ms"], "text": body["choices"][0]["message"]["content"]}

    def memory(self, name: str = "anna") -> bytes:
        return self.http.get(f"/v1/sessions/{name}/memory").content

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.getvalue().splitlines()]


MakeFront = Callable[..., Front]


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
