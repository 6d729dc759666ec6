"""A gateway under test, and how it is asked."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
from fake_llama import FakeLlama
from memory_store import MemoryStore

from llamamem.gateway import Gateway


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
