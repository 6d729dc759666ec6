"""A thin client of a running llama-server: one method an endpoint, answers as the server gave them."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import httpx

from llamamem.errors import LlamamemError


class Client:
    """`Client("http://127.0.0.1:8080")`, usable as a context manager.

    Methods return the decoded JSON. They raise LlamamemError with the server's own message when the status is not 2xx,
    and when nobody answers; `request` returns the bare httpx response for whoever wants to see the status.
    """

    def __init__(self, url: str, *, api_key: str | None = None, timeout: float = 600.0) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        # A proxy from the environment has no business between us and a server on this machine.
        self._http = httpx.Client(base_url=url, headers=headers, timeout=timeout, trust_env=False)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    @property
    def url(self) -> httpx.URL:
        return self._http.base_url

    def request(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        try:
            return self._http.request(method, path, **kwargs)
        except httpx.TransportError as e:
            raise LlamamemError(
                f"{self._http.base_url}: {method} {path} failed ({type(e).__name__}: {e}); is the server running?"
            ) from e

    def health(self) -> dict[str, Any]:
        return self._object("GET", "/health")

    def models(self) -> list[str]:
        """Ids of the models that are served."""
        return [str(model["id"]) for model in self._object("GET", "/v1/models")["data"]]

    def props(self) -> dict[str, Any]:
        return self._object("GET", "/props")

    def slots(self) -> list[dict[str, Any]]:
        slots: list[dict[str, Any]] = self._json("GET", "/slots")
        return slots

    def tokenize(self, text: str, **kwargs: Any) -> list[int]:
        tokens: list[int] = self._object("POST", "/tokenize", json={"content": text, **kwargs})["tokens"]
        return tokens

    def completion(self, prompt: str | list[int], **kwargs: Any) -> dict[str, Any]:
        """`POST /completion`; greedy unless told otherwise."""
        return self._object("POST", "/completion", json={"prompt": prompt, **_GREEDY, **kwargs})

    def chat(self, messages: list[dict[str, str]], **kwargs: Any) -> dict[str, Any]:
        """`POST /v1/chat/completions`; greedy unless told otherwise."""
        return self._object("POST", "/v1/chat/completions", json={"messages": messages, **_GREEDY, **kwargs})

    def save_slot(self, slot: int, filename: str) -> dict[str, Any]:
        return self._object("POST", f"/slots/{slot}", params={"action": "save"}, json={"filename": filename})

    def restore_slot(self, slot: int, filename: str) -> dict[str, Any]:
        return self._object("POST", f"/slots/{slot}", params={"action": "restore"}, json={"filename": filename})

    def erase_slot(self, slot: int) -> dict[str, Any]:
        return self._object("POST", f"/slots/{slot}", params={"action": "erase"}, json={})

    def save_memory(self, slot: int, filename: str) -> dict[str, Any]:
        """Writes the slot's memory alone to a file of the server's slot directory."""
        return self._object("POST", f"/slots/{slot}", params={"action": "memory-save"}, json={"filename": filename})

    def restore_memory(self, slot: int, filename: str) -> dict[str, Any]:
        """Drops the slot's text; its next one starts at position 0 on the memory of the file."""
        return self._object("POST", f"/slots/{slot}", params={"action": "memory-restore"}, json={"filename": filename})

    def reset_memory(self, slot: int) -> dict[str, Any]:
        """The memory is as in a fresh slot; the text stays."""
        return self._object("POST", f"/slots/{slot}", params={"action": "memory-reset"}, json={})

    def set_memory(self, slot: int, *, frozen: bool = False, scale: float = 1.0) -> dict[str, Any]:
        """Until changed: a frozen memory is read and not written to; `scale` is a factor of its deltas, 0 the base."""
        body = {"frozen": frozen, "scale": scale}
        return self._object("POST", f"/slots/{slot}", params={"action": "memory-set"}, json=body)

    def _object(self, method: str, path: str, **kwargs: Any) -> dict[str, Any]:
        answer: dict[str, Any] = self._json(method, path, **kwargs)
        return answer

    def _json(self, method: str, path: str, **kwargs: Any) -> Any:
        response = self.request(method, path, **kwargs)
        if response.is_success:
            return response.json()
        try:
            reason = response.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):
            reason = response.text[:200]
        raise LlamamemError(f"{self._http.base_url}: {method} {path} answered {response.status_code}: {reason}")


_GREEDY: dict[str, Any] = {"temperature": 0.0, "top_k": 1, "seed": 123}
