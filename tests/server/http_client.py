"""A client that knows HTTP and JSON and nothing of llamamem: what a stranger has."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any


def post(url: str, path: str, body: Any, timeout: float = 60.0) -> tuple[int, Any]:
    """Status and JSON of an answer."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url + path, json.dumps(body).encode(), headers)
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=timeout) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as e:
        with e:
            return e.code, json.load(e)


def chat(url: str, messages: list[dict[str, str]], max_tokens: int = 12, **more: Any) -> dict[str, Any]:
    """A greedy answer; its words are `said`, and its rwkv_ms is as it came."""
    body = {"messages": messages, "temperature": 0, "max_tokens": max_tokens, **more}
    status, answer = post(url, "/v1/chat/completions", body)
    assert status == 200, answer
    return {**answer, "said": answer["choices"][0]["message"]["content"].strip()}


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]
