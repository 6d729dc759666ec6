"""A request to a gateway, in one of the ways that clients have."""

from __future__ import annotations

import json
import random
import time
from dataclasses import dataclass
from typing import Any

import httpx

from once.rules import Talk, raw_prompt

CHAT, MESSAGES, RESPONSES, COMPLETION, COMPLETIONS = ROUTES = (
    *("/v1/chat/completions", "/v1/messages", "/v1/responses"),
    *("/completion", "/v1/completions"),
)
RAW = (COMPLETION, COMPLETIONS)
NAMES = (
    "url",
    "x-session-id",
    "x-litellm-session-id",
    "x-openwebui-user-id",
    "rwkv_ms",
    "session_id",
    "user_id",
    "user",
)
IDS = ("x-conversation-id", "x-openwebui-chat-id", "rwkv_ms")
PATIENCE = 60.0  # seconds for an answer, and for a gateway that is started again


@dataclass(frozen=True)
class Way:
    """Of a client, which has one and keeps to it."""

    route: str
    named_by: str
    id_by: str

    @classmethod
    def drawn(cls, rng: random.Random) -> Way:
        route = rng.choices(ROUTES, (5, 2, 2, 1, 1))[0]
        return cls(route, rng.choice(NAMES), rng.choice(IDS))

    @property
    def raw(self) -> bool:
        return self.route in RAW


@dataclass(frozen=True)
class Answer:
    """`cut`: it ended because it was long enough; None where the route does not say. `told`: what the gateway said."""

    text: str
    cut: bool | None
    told: dict[str, Any]


class Refused(Exception):
    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"{status}: {text[:300]}")
        self.status = status


class HungUp(Exception):
    """As was wanted: the client went away before it had its answer."""


def ask(
    http: httpx.Client,
    way: Way,
    name: str,
    talk: Talk,
    *,
    id: str | None = None,
    n: int = 12,
    stream: bool = False,
    mode: str | None = None,
    hang_up: float | None = None,
    cancel_after: int | None = None,
) -> Answer:
    """`hang_up` is in seconds, `cancel_after` in pieces of the stream; both raise HungUp."""
    path, headers, body = request(way, name, talk, id=id, n=n, mode=mode)
    if stream or cancel_after is not None:
        body["stream"] = True
    timeout = PATIENCE if hang_up is None else hang_up
    until = time.monotonic() + PATIENCE
    while True:
        try:
            with http.stream("POST", path, json=body, headers=headers, timeout=timeout) as response:
                if response.status_code == 503 and time.monotonic() < until:
                    time.sleep(0.1)
                    continue
                if response.status_code != 200:
                    raise Refused(response.status_code, response.read().decode(errors="replace"))
                if not body.get("stream"):
                    return whole(way.route, json.loads(response.read()))
                return streamed(way.route, response, cancel_after)
        except httpx.ReadTimeout:
            if hang_up is None:
                raise
            raise HungUp from None
        except (httpx.ConnectError, httpx.ConnectTimeout):  # it is started again
            if time.monotonic() > until:
                raise
            time.sleep(0.1)


def request(
    way: Way, name: str, talk: Talk, *, id: str | None, n: int, mode: str | None
) -> tuple[str, dict[str, str], dict[str, Any]]:
    headers: dict[str, str] = {}
    body: dict[str, Any] = {"temperature": 0.0, "top_k": 1}
    if way.raw:
        body |= {"prompt": raw_prompt(talk), "n_predict": n}
    elif way.route == RESPONSES:
        body |= {"input": [_item(said.role, said.text) for said in talk], "max_output_tokens": n}
    elif way.route == MESSAGES:
        body |= {"messages": [{"role": s.role, "content": s.text} for s in talk if s.role != "system"], "max_tokens": n}
        for said in talk:
            if said.role == "system":
                body["system"] = said.text
    else:
        body |= {"messages": [{"role": s.role, "content": s.text} for s in talk], "max_tokens": n}
    path = way.route
    if way.named_by == "url":
        path = f"/session/{name}{way.route}"
    elif way.named_by.startswith("x-"):
        headers[way.named_by] = name
    elif way.named_by == "rwkv_ms":
        body["rwkv_ms"] = {"session": name}
    elif way.named_by == "user":
        body["user"] = name
    else:
        body["metadata"] = {way.named_by: name}
    if id is not None and way.id_by == "rwkv_ms":
        body.setdefault("rwkv_ms", {})["conversation"] = id
    elif id is not None:
        headers[way.id_by] = id
    if mode is not None:
        headers["x-memory"] = mode
    return path, headers, body


def whole(route: str, body: dict[str, Any]) -> Answer:
    told = _told(body)
    if route == COMPLETION:
        return Answer(body["content"], body["stop_type"] == "limit", told)
    if route in (COMPLETIONS, CHAT):
        choice = body["choices"][0]
        text = choice["text"] if route == COMPLETIONS else choice["message"]["content"]
        return Answer(text or "", choice["finish_reason"] == "length", told)
    if route == MESSAGES:
        return Answer("".join(p.get("text", "") for p in body["content"]), body["stop_reason"] == "max_tokens", told)
    text = "".join(part["text"] for item in body["output"] for part in item.get("content", []))
    return Answer(text, None, told)


def streamed(route: str, response: httpx.Response, cancel_after: int | None) -> Answer:
    text, cut, told, pieces = "", False, None, 0
    for line in response.iter_lines():
        if not line.startswith("data:") or line.endswith("[DONE]"):
            continue
        event = json.loads(line[5:])
        if event.get("error"):
            raise Refused(0, line)
        piece = _piece(route, event)
        text, pieces = text + piece, pieces + bool(piece)
        if cancel_after is not None and pieces >= cancel_after:
            raise HungUp
        choice = (event.get("choices") or [{}])[0]
        cut = cut or choice.get("finish_reason") == "length" or event.get("stop_type") == "limit"
        delta = event.get("delta")
        cut = cut or (isinstance(delta, dict) and delta.get("stop_reason") == "max_tokens")
        told = _told(event) or told
    if told is None:
        raise Refused(0, "the stream ended before its end")
    return Answer(text, None if route == RESPONSES else cut, told)


def _piece(route: str, event: dict[str, Any]) -> str:
    if route == COMPLETION:
        return str(event.get("content") or "")
    if route in (COMPLETIONS, CHAT):
        choice = (event.get("choices") or [{}])[0]
        return str((choice.get("text") if route == COMPLETIONS else (choice.get("delta") or {}).get("content")) or "")
    if route == MESSAGES:
        return str((event.get("delta") or {}).get("text") or "")
    return str(event.get("delta") or "") if event.get("type") == "response.output_text.delta" else ""


def _told(event: dict[str, Any]) -> dict[str, Any]:
    response = event.get("response")
    return dict(event.get("rwkv_ms") or (response.get("rwkv_ms") if isinstance(response, dict) else None) or {})


def _item(role: str, text: str) -> dict[str, Any]:
    if role == "assistant":
        return {"type": "message", "role": role, "content": [{"type": "output_text", "text": text}]}
    return {"role": role, "content": text}
