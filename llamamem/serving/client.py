"""A thin client of a running llama-server: one method an endpoint, answers as the server gave them."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import httpx

from llamamem.errors import LlamamemError


@dataclass(frozen=True)
class Delta:
    """A piece of a streamed answer: text, or thoughts of a model that thinks aloud.

    The last ones carry why it ended (`stop`, `length`), tokens and times as the server counts them, and what it says
    of the memory to a request with an `rwkv_ms`.
    """

    text: str = ""
    reasoning: str = ""
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None
    timings: dict[str, Any] | None = None
    rwkv_ms: dict[str, Any] | None = None


class Client:
    """`Client("http://127.0.0.1:8080")`, usable as a context manager.

    Methods return the decoded JSON. They raise LlamamemError with the server's own message when the status is not 2xx,
    and when nobody answers; `request` returns the bare httpx response for whoever wants to see the status.

    A slot action waits for a busy slot no longer than `_SLOT_WAIT`: what was given up by then has changed nothing.
    """

    def __init__(self, url: str, *, api_key: str | None = None, timeout: float = 600.0) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        # A proxy from the environment has no business between us and a server on this machine.
        # A connection each: the server closes one after a stream, and a request that reuses it just then is cut off.
        limits = httpx.Limits(max_keepalive_connections=0)
        self._slot_wait = min(_SLOT_WAIT, timeout)
        self._slot_timeout = min(_SLOT_WAIT + _LATE, timeout)
        self._http = httpx.Client(base_url=url, headers=headers, timeout=timeout, trust_env=False, limits=limits)

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
            raise self._unreachable(f"{method} {path}", e) from e

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

    def apply_template(self, messages: list[dict[str, str]], **kwargs: Any) -> str:
        """The text that the model gets of these messages."""
        prompt: str = self._object("POST", "/apply-template", json={"messages": messages, **kwargs})["prompt"]
        return prompt

    def completion(self, prompt: str | list[int], **kwargs: Any) -> dict[str, Any]:
        """`POST /completion`; greedy unless told otherwise."""
        return self._object("POST", "/completion", json={"prompt": prompt, **_GREEDY, **kwargs})

    def chat(self, messages: list[dict[str, str]], **kwargs: Any) -> dict[str, Any]:
        """`POST /v1/chat/completions`; greedy unless told otherwise."""
        return self._object("POST", "/v1/chat/completions", json={"messages": messages, **_GREEDY, **kwargs})

    def stream_chat(self, messages: list[dict[str, str]], **kwargs: Any) -> Generator[Delta, None, None]:
        """The same, piece by piece; greedy unless told otherwise, and a field that is None is left to the server.

        Closing the iterator (or an exception in the loop over it) ends the answer on the server too. Raises
        LlamamemError when the server refuses, reports an error midway, or goes away before the answer is whole.
        """
        fields = {"messages": messages, **_GREEDY, **kwargs, "stream": True, "stream_options": {"include_usage": True}}
        body = {name: value for name, value in fields.items() if value is not None}
        path = "/v1/chat/completions"
        try:
            with self._http.stream("POST", path, json=body) as response:
                if not response.is_success:
                    response.read()
                    raise self._refused(f"POST {path}", response)
                for event in _events(response):
                    if "error" in event:
                        raise LlamamemError(f"{self.url}: the answer broke off: {_message(event) or event['error']}")
                    yield _delta(event)
        except httpx.TransportError as e:
            raise self._unreachable(f"POST {path}", e) from e
        except _Incomplete:
            raise LlamamemError(f"{self.url}: the answer broke off; see the server's log") from None

    def save_slot(self, slot: int, filename: str) -> dict[str, Any]:
        return self._slot(slot, "save", filename=filename)

    def restore_slot(self, slot: int, filename: str) -> dict[str, Any]:
        return self._slot(slot, "restore", filename=filename)

    def erase_slot(self, slot: int) -> dict[str, Any]:
        return self._slot(slot, "erase")

    def save_memory(self, slot: int, filename: str) -> dict[str, Any]:
        """Writes the slot's memory alone to a file of the server's slot directory."""
        return self._slot(slot, "memory-save", filename=filename)

    def restore_memory(self, slot: int, filename: str) -> dict[str, Any]:
        """Drops the slot's text; its next one starts at position 0 on the memory of the file."""
        return self._slot(slot, "memory-restore", filename=filename)

    def take_memory(self, slot: int, *, continues: dict[str, Any] | None = None) -> tuple[bytes, dict[str, Any]]:
        """The slot's memory, as the bytes of a memory-only state file, and the rest of the answer.

        With `continues` (origin, n_text and text, as an earlier answer had them) it is refused with the reason
        `state-continues` unless the slot's text still goes on from there.
        """
        body = {"return_memory": True} | ({} if continues is None else {"continues": continues})
        answer = self._slot(slot, "memory-save", **body)
        return decoded_memory(answer, str(self.url)), answer

    def give_memory(self, slot: int, memory: bytes) -> dict[str, Any]:
        """The same as `restore_memory`, with the bytes in the request."""
        return self._slot(slot, "memory-restore", memory=encoded_memory(memory))

    def reset_memory(self, slot: int) -> dict[str, Any]:
        """Text, memory and setting are as in a fresh slot."""
        return self._slot(slot, "memory-reset")

    def set_memory(self, slot: int, *, frozen: bool = False, scale: float = 1.0) -> dict[str, Any]:
        """Until changed: a frozen memory is read and not written to; `scale` is a factor of its deltas, 0 the base."""
        return self._slot(slot, "memory-set", frozen=frozen, scale=scale)

    def _slot(self, slot: int, action: str, **body: Any) -> dict[str, Any]:
        body["timeout"] = self._slot_wait
        path, params = f"/slots/{slot}", {"action": action}
        return self._object("POST", path, params=params, json=body, timeout=self._slot_timeout)

    def _object(self, method: str, path: str, **kwargs: Any) -> dict[str, Any]:
        answer: dict[str, Any] = self._json(method, path, **kwargs)
        return answer

    def _json(self, method: str, path: str, **kwargs: Any) -> Any:
        response = self.request(method, path, **kwargs)
        if response.is_success:
            return response.json()
        raise self._refused(f"{method} {path}", response)

    def _refused(self, what: str, response: httpx.Response) -> LlamamemError:
        try:
            reason = _message(response.json())
        except ValueError:
            reason = None
        said = f"{self.url}: {what} answered {response.status_code}: {reason or response.text[:200]}"
        if response.status_code == 401:
            said += "; give its key with --api-key"
        code = re.search(r"\[([a-z]+-[a-z-]+)\]", reason or "")  # the first: a path may hold anything
        return LlamamemError(said, reason=code[1] if code else None)

    def _unreachable(self, what: str, error: httpx.TransportError) -> LlamamemError:
        return LlamamemError(f"{self.url}: {what} failed ({type(error).__name__}: {error}); is the server running?")


def encoded_memory(memory: bytes | None) -> str | None:
    """As the field `rwkv_ms.memory` of a request has it; None is the empty memory."""
    return None if memory is None else base64.b64encode(memory).decode()


def decoded_memory(answer: dict[str, Any] | None, url: str) -> bytes:
    """The memory in an answer that was asked for one. `url` is for the error that it is not there."""
    try:
        return base64.b64decode((answer or {})["memory"], validate=True)
    except (KeyError, TypeError, binascii.Error):
        raise LlamamemError(
            f"{url}: the answer brings no memory; `llamamem build`, then start the server again"
        ) from None


class _Incomplete(Exception):
    """The stream ended before its `[DONE]`."""


def _events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """The events of an answer. httpx's own lines also end at characters that are part of a text, such as U+2028."""
    rest = b""
    for received in response.iter_bytes():
        *lines, rest = (rest + received).split(b"\n")
        for line in lines:
            data = line.removeprefix(b"data:").strip()
            if not line.startswith(b"data:"):
                continue
            if data == b"[DONE]":
                return
            try:
                event = json.loads(data)
            except ValueError:
                raise _Incomplete from None
            if isinstance(event, dict):
                yield event
    raise _Incomplete


def _delta(event: dict[str, Any]) -> Delta:
    choice = (event.get("choices") or [{}])[0]
    said = choice.get("delta") or {}
    return Delta(
        text=said.get("content") or "",
        reasoning=said.get("reasoning_content") or "",
        finish_reason=choice.get("finish_reason"),
        usage=event.get("usage"),
        timings=event.get("timings"),
        rwkv_ms=event.get("rwkv_ms"),
    )


def _message(answer: Any) -> str | None:
    """The reason in an error of the server."""
    try:
        return str(answer["error"]["message"])
    except (KeyError, TypeError):
        return None


_GREEDY: dict[str, Any] = {"temperature": 0.0, "top_k": 1, "seed": 123}

_SLOT_WAIT = 60.0  # seconds, for a slot that works
_LATE = 15.0  # more, for the action itself
