"""`llamamem session`, `chat` and `eval` where only a gateway's URL and a key are known."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fronts import Front, MakeFront
from memory_store import MemoryStore

from llamamem.errors import LlamamemError
from llamamem.gateway.access import new_key
from llamamem.serving.client import Client
from llamamem.sessions import Memory
from llamamem.sessions.remote import GatewaySessions, is_gateway


@pytest.fixture(autouse=True)
def own_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("XDG_STATE_HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    for name in ("LLAMAMEM_SESSIONS", "LLAMA_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def command(front_with_key: tuple[Front, str], llamamem: Callable[..., Any]) -> Callable[..., Any]:
    front, key = front_with_key
    return lambda *args: llamamem(*args, "--url", str(front.http.base_url), "--api-key", key)


@pytest.fixture
def front_with_key(make_front: MakeFront) -> tuple[Front, str]:
    store = MemoryStore()
    told, kept = new_key()
    store.add_key(kept)
    front = make_front(store)
    front.http.headers["Authorization"] = f"Bearer {told}"
    return front, told


def test_sessions_are_listed_undone_and_removed(front_with_key: tuple[Front, str], command: Any) -> None:
    front, _ = front_with_key
    for name in ("anna", "bob b"):
        answer = front.told("a", name=name)["text"]
        front.told("a", answer, "b", name=name)
    listed = json.loads(command("session", "list", "--json").out)
    assert [one["name"] for one in listed["sessions"]] == ["anna", "bob b"]
    page = json.loads(command("session", "list", "--limit", "1", "--after", "anna", "--json").out)
    assert [one["name"] for one in page["sessions"]] == ["bob b"]
    history = json.loads(command("session", "history", "bob b", "--json").out)
    assert [one["generation"] for one in history["generations"]] == [2, 1]
    assert command("session", "undo", "bob b").status == 0
    assert command("session", "start", "copy", "--from", "bob b").status == 0
    assert front.memory("copy") == front.memory("bob b")
    assert command("session", "rm", "bob b").status == 0
    assert front.http.get("/v1/sessions/bob b").status_code == 404
    missing = command("session", "rm", "bob b")
    assert missing.status == 2 and "bob b" in missing.err and missing.err.count("\n") == 1


def test_without_the_key_one_is_told_so(front_with_key: tuple[Front, str], llamamem: Callable[..., Any]) -> None:
    result = llamamem("session", "list", "--url", str(front_with_key[0].http.base_url))
    assert result.status == 2 and "--api-key" in result.err and "Traceback" not in result.err


def test_a_chat_saves_to_the_gateway_and_loads_from_it(
    front_with_key: tuple[Front, str], command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    front, _ = front_with_key

    def chat(script: str) -> Any:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(script.encode())))
        return command("chat")

    assert chat("this is anna baker.\n/save anna\n").status == 0
    memory = front.memory("anna")
    assert front.http.get("/v1/sessions/anna").json()["generation"] == 1
    loaded = chat("/load anna\nwho is anna?\n/save anna\n")
    assert loaded.status == 0, loaded.err
    assert front.http.get("/v1/sessions/anna").json()["generation"] == 2 and front.memory("anna") != memory
    assert chat("/load nobody\n").status == 2


def test_a_save_over_what_another_saved_is_refused(front_with_key: tuple[Front, str]) -> None:
    front, key = front_with_key
    front.told("a")
    with Client(str(front.http.base_url), api_key=key) as client:
        assert is_gateway(client)
        sessions = GatewaySessions(client)
        session, memory = sessions.load("anna")
        assert memory == front.memory()
        front.told("b")
        with pytest.raises(LlamamemError, match="changed"):
            sessions.save(session, Memory(memory or b"", 1, "0" * 64, "1" * 64))
        assert front.http.get("/v1/sessions/anna").json()["generation"] == 2


def test_a_suite_is_put_to_a_gateway(front_with_key: tuple[Front, str], command: Any, tmp_path: Path) -> None:
    suite = tmp_path / "suite.jsonl"
    suite.write_text('{"id": "1", "prompt": "who is anna?", "expect": {"regex": "."}}\n')
    result = command("eval", suite)
    assert result.status == 0, result.err
