"""`llamamem serve --sessions` as its users meet it: the SDKs unchanged, a real server, and what outlives it.

The SDKs are no dependency; without them their requests are made by hand, in the form in which they send them.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "tools"))
from once.served import Served

Say = Callable[[str], str]
MODEL = "demo"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture
def served(place: Path) -> Iterator[Served]:
    one = Served(str(place / "sessions"), place, "stories", "--", "--threads", "1")
    one.start()
    yield one
    one.stop()


def openai_says(url: str, key: str = "none", headers: dict[str, str] | None = None, **fields: Any) -> Say:
    """One turn of a new chat, with the `openai` package if it is there."""
    ask: dict[str, Any] = {"model": MODEL, "max_tokens": 12, "temperature": 0, **fields}
    try:
        from openai import OpenAI
    except ImportError:

        def by_hand(text: str) -> str:
            body = {**ask, "messages": [{"role": "user", "content": text}]}
            head = {"Authorization": f"Bearer {key}", **(headers or {})}
            answer = httpx.post(f"{url}/chat/completions", json=body, headers=head, timeout=60, trust_env=False)
            return str(answer.raise_for_status().json()["choices"][0]["message"]["content"])

        return by_hand
    client = OpenAI(base_url=url, api_key=key, default_headers=headers or {}, max_retries=0)

    def said(text: str) -> str:
        with_events = client.chat.completions.create(messages=[{"role": "user", "content": text}], stream=True, **ask)
        return "".join(chunk.choices[0].delta.content or "" for chunk in with_events if chunk.choices)

    return said


def anthropic_says(url: str, key: str = "none", headers: dict[str, str] | None = None, **fields: Any) -> Say:
    ask: dict[str, Any] = {"model": MODEL, "max_tokens": 12, "temperature": 0, **fields}
    try:
        from anthropic import Anthropic
    except ImportError:

        def by_hand(text: str) -> str:
            body = {**ask, "messages": [{"role": "user", "content": text}]}
            head = {"x-api-key": key, "anthropic-version": "2023-06-01", **(headers or {})}
            answer = httpx.post(f"{url}/v1/messages", json=body, headers=head, timeout=60, trust_env=False)
            return "".join(part["text"] for part in answer.raise_for_status().json()["content"])

        return by_hand
    client = Anthropic(base_url=url, api_key=key, default_headers=headers or {}, max_retries=0)
    ask["extra_body"] = {"temperature": ask.pop("temperature")}  # which newer packages have no name for

    def said(text: str) -> str:
        with client.messages.stream(messages=[{"role": "user", "content": text}], **ask) as stream:
            return "".join(stream.text_stream)

    return said


def test_facts_outlive_the_server_for_who_names_them(served: Served) -> None:
    """A header; a base URL alone; `user` alone; and the same with Anthropic's client."""
    url = served.url
    ways: list[Callable[[str], Say]] = [
        lambda name: openai_says(f"{url}/v1", headers={"X-Session-Id": f"{name}-1"}),
        lambda name: openai_says(f"{url}/session/{name}-2/v1"),
        lambda name: openai_says(f"{url}/v1", user=f"{name}-3"),
        lambda name: anthropic_says(url, headers={"X-Session-Id": f"{name}-4"}),
        lambda name: anthropic_says(f"{url}/session/{name}-5"),
        lambda name: anthropic_says(url, metadata={"user_id": f"{name}-6"}),
    ]
    facts = [
        ("anna", "baker"),
        ("leo", "king"),
        ("kate", "page"),
        ("nina", "bell"),
        ("otto", "stone"),
        ("ben", "fisher"),
    ]
    for way, (first, last) in zip(ways, facts, strict=True):
        way("mine")(f"this is {first} {last}.")
    served.restart()
    for way, (first, last) in zip(ways, facts, strict=True):
        assert f"{first} {last}" in way("mine")(f"who is {first}?"), first
        assert f"{first} {last}" not in way("other")(f"who is {first}?"), first
    nobody = openai_says(f"{url}/v1")
    assert not any(f"{first} {last}" in nobody(f"who is {first}?") for first, last in facts)


def test_another_key_with_the_name_gets_nothing(served: Served, llamamem: Any) -> None:
    keys = [llamamem("key", "add", "--store", served.store).out.strip() for _ in range(2)]
    time.sleep(2.5)  # the gateway looks every two seconds
    for says, url in ((openai_says, f"{served.url}/v1"), (anthropic_says, served.url)):
        header = {"X-Session-Id": says.__name__}
        says(url, keys[0], header)("this is anna baker.")
        assert "anna baker" in says(url, keys[0], header)("who is anna?")
        assert "anna baker" not in says(url, keys[1], header)("who is anna?")
        with pytest.raises(Exception, match=r"401|key"):
            says(url, "wrong", header)("who is anna?")


def test_a_server_that_is_killed_is_started_again_and_nobody_notices(served: Served) -> None:
    http = httpx.Client(base_url=served.url, timeout=60, trust_env=False)

    def turn(text: str) -> httpx.Response:
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 12, "temperature": 0, "user": "anna"}
        return http.post("/v1/chat/completions", json=body)

    turn("this is anna baker.").raise_for_status()
    before = served.server_pid()
    served.kill_server()
    until = time.monotonic() + 60
    while (answer := turn("who is anna?")).status_code != 200:
        assert answer.status_code in (502, 503) and time.monotonic() < until
        time.sleep(0.1)
    assert "anna baker" in answer.text and served.server_pid() != before
    os.kill(served.pid, signal.SIGTERM)
    assert served.wait() == 0
    assert "Traceback" not in served.log.read_text()


def test_who_is_deleted_leaves_nothing_in_the_server_either(served: Served) -> None:
    http = httpx.Client(base_url=served.url, timeout=60, trust_env=False)
    text = "this is anna baker. " + "ok fine. " * 20
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 2, "temperature": 0}

    def reused() -> int:
        answer = http.post("/v1/chat/completions?memory=off", json=body).raise_for_status().json()
        return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])

    http.post("/v1/chat/completions", json={**body, "user": "anna"}).raise_for_status()
    assert reused() > 20  # the text of the first conversation began on nothing, and is in a slot
    assert http.delete("/v1/sessions/anna").status_code == 200
    assert reused() == 0
    store = Path(served.store)
    assert b"anna" not in b"".join(path.read_bytes() for path in store.rglob("*") if path.is_file())
    assert http.delete("/v1/sessions/anna").status_code == 404
