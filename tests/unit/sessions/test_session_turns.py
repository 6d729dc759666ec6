"""Turns: asked on the memory of a session, which is kept as it comes back; and what may happen in between."""

from __future__ import annotations

import base64
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from fake_memory_server import IDENTITY, FakeServer, Learnt, Slot, die, refuse

from llamamem.errors import LlamamemError
from llamamem.formats.state import MEMORY, read_state
from llamamem.serving.client import Client
from llamamem.sessions import Conflict, Sessions, SessionStore


def test_a_turn_carries_the_memory_and_keeps_what_comes_back(sessions: Sessions, server: FakeServer) -> None:
    sessions.start("alice")
    first = sessions.turn("alice", "one two")
    second = sessions.turn("alice", [11, 12, 13], n_predict=5)
    third = sessions.turn("alice", [{"role": "user", "content": "and now"}])
    assert server.actions == ["completion"] * 3 and all("id_slot" not in body for _, body in server.asked)
    body = server.asked[1][1]
    assert (body["prompt"], body["n_predict"]) == ([11, 12, 13], 5)
    assert server.asked[2][1]["messages"][0]["content"] == "and now"
    alone = Learnt()
    for words, answer in ((["one", "two"], first), (["11", "12", "13"], second), (["and", "now"], third)):
        alone = alone.read(words)
        assert answer["content"] == alone.said
        alone = alone.read([alone.said])
        assert "memory" not in answer["rwkv_ms"]
    loaded, _ = sessions.store.load("alice")
    assert (loaded.generation, loaded.tokens) == (3, alone.tokens)
    assert all(slot.memory == Learnt() and not slot.given for slot in server.slots), "no slot was given anything"


def test_64_sessions_on_two_servers_behind_one_name_get_the_answers_that_they_get_alone(store: SessionStore) -> None:
    """No directory is shared and no slot is sticky: each turn goes where there is room."""
    names = [f"session {i}" for i in range(64)]
    with ExitStack() as stack:
        servers = [stack.enter_context(FakeServer()) for _ in range(2)]
        clients = [stack.enter_context(Client(server.url, timeout=30)) for server in servers]
        here, there = (Sessions(client, store) for client in clients)
        here.start("prefix")
        here.turn("prefix", "what all of them know")
        for i, name in enumerate(names):
            here.start(name, "prefix" if i % 2 else None)
        jobs = [(name, turn) for turn in range(3) for name in names]

        def play(job: tuple[int, tuple[str, int]]) -> tuple[str, int, str]:
            i, (name, turn) = job
            return name, turn, (here, there)[i % 2].turn(name, f"{name} says {turn}")["content"]

        answers = [play((i + i // 64, job)) for i, job in enumerate(jobs)]
        with ThreadPoolExecutor(8) as pool:
            answers += list(pool.map(play, [(i, (name, 3)) for i, name in enumerate(names)]))
        assert all(len(server.asked) > 64 for server in servers)
    for i, name in enumerate(names):
        alone = Learnt()
        if i % 2:
            alone = alone.read(["what", "all", "of", "them", "know"])
            alone = alone.read([alone.said])
        for turn in range(4):
            alone = alone.read(f"{name} says {turn}".split())
            assert [said for n, t, said in answers if (n, t) == (name, turn)] == [alone.said]
            alone = alone.read([alone.said])


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_server_that_dies_in_a_turn_leaves_the_session(sessions: Sessions, server: FakeServer, moment: str) -> None:
    sessions.start("alice")
    sessions.turn("alice", "hello")
    loaded, state = sessions.store.load("alice")
    getattr(server, moment)["completion"] = die
    with pytest.raises(LlamamemError, match="is the server running"):
        sessions.turn("alice", "more")
    again, unchanged = sessions.store.load("alice")
    assert (again.generation, unchanged) == (loaded.generation, state)


def test_the_text_of_a_refusal_is_shown_as_it_is(sessions: Sessions, server: FakeServer) -> None:
    sessions.start("alice")
    sessions.turn("alice", "hello")
    loaded, state = sessions.store.load("alice")
    text = "rwkv_ms.memory: [state-checksum] the block has another hash; save it again"
    server.before["completion"] = refuse(text)
    with pytest.raises(LlamamemError) as refused:
        sessions.turn("alice", "more")
    assert f"answered 400: {text}" in str(refused.value) and refused.value.exit_status == 2
    again, unchanged = sessions.store.load("alice")
    assert (again.generation, unchanged) == (loaded.generation, state)


@pytest.mark.parametrize("spoil", [lambda d: d[:-1], lambda d: d[:400] + b"\xff" + d[401:], lambda d: b""])
def test_a_damaged_memory_of_the_server_is_not_saved(
    sessions: Sessions, server: FakeServer, spoil: Callable[[bytes], bytes]
) -> None:
    sessions.start("alice")
    sessions.turn("alice", "hello")
    before = sessions.store.load("alice")[1]
    whole = server.complete

    def complete(slot: Slot, body: dict[str, Any], *, own: bool) -> dict[str, Any]:
        answer = whole(slot, body, own=own)
        memory = base64.b64decode(answer["rwkv_ms"]["memory"])
        answer["rwkv_ms"]["memory"] = base64.b64encode(spoil(memory)).decode()
        return answer

    server.complete = complete  # type: ignore[method-assign]
    with pytest.raises(LlamamemError, match="state-") as refused:
        sessions.turn("alice", "more")
    assert refused.value.reason in ("state-truncated", "state-checksum", "state-format")
    assert sessions.store.load("alice")[1] == before


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda answer: answer.pop("rwkv_ms"), "brings no memory"),
        (lambda answer: answer["rwkv_ms"].pop("memory"), "brings no memory"),
        (lambda answer: answer["rwkv_ms"].update(memory="%%%"), "brings no memory"),
        (lambda answer: answer["rwkv_ms"].update(origin="00" * 32), "began on memory 0000"),
        (lambda answer: answer.pop("timings"), "no timings"),
        (lambda answer: answer["timings"].update(prompt_n=9), "in a turn of 9"),
    ],
)
def test_an_answer_that_does_not_go_on_from_the_session_is_not_saved(
    sessions: Sessions, server: FakeServer, edit: Callable[[dict[str, Any]], Any], said: str
) -> None:
    sessions.start("alice")
    sessions.turn("alice", "hello")
    before = sessions.store.load("alice")[1]
    whole = server.complete

    def complete(slot: Slot, body: dict[str, Any], *, own: bool) -> dict[str, Any]:
        answer = whole(slot, body, own=own)
        edit(answer)
        return answer

    server.complete = complete  # type: ignore[method-assign]
    with pytest.raises(LlamamemError, match=said):
        sessions.turn("alice", "more text")
    assert sessions.store.load("alice")[1] == before


def test_a_frozen_turn_reads_and_saves_nothing(sessions: Sessions, server: FakeServer) -> None:
    sessions.start("alice")
    sessions.turn("alice", "hello")
    loaded, state = sessions.store.load("alice")
    server.asked.clear()
    one = sessions.turn("alice", "question", rwkv_ms={"frozen": True})
    two = sessions.turn("alice", "question", rwkv_ms={"frozen": True})
    assert one["content"] == two["content"]
    sent = server.asked[1][1]["rwkv_ms"]
    assert (sent["frozen"], sent["scale"], sent["return_memory"]) == (True, 1.0, False) and sent["memory"]
    again, unchanged = sessions.store.load("alice")
    assert (again.generation, unchanged) == (loaded.generation, state)


def test_a_turn_does_not_depend_on_what_a_slot_was_set_to(sessions: Sessions, server: FakeServer) -> None:
    sessions.start("alice")
    sessions.turn("alice", "hello")
    sessions.turn("alice", "hello", rwkv_ms={"scale": 0.5})
    sent = [body["rwkv_ms"] for _, body in server.asked]
    assert [(setting["frozen"], setting["scale"]) for setting in sent] == [(False, 1.0), (False, 0.5)]


@pytest.mark.parametrize("option", ["stream", "n", "n_cmpl"])
def test_what_a_turn_sets_itself_cannot_be_given(sessions: Sessions, server: FakeServer, option: str) -> None:
    sessions.start("alice")
    with pytest.raises(LlamamemError, match=f"sets {option} itself"):
        sessions.turn("alice", "hello", **{option: 1})
    assert server.asked == []


def test_of_two_turns_of_one_session_the_later_save_is_told(sessions: Sessions, server: FakeServer) -> None:
    sessions.start("alice")

    def in_between(_: Slot) -> None:
        server.before.clear()
        sessions.turn("alice", "quick", id_slot=1)

    server.before["completion"] = in_between
    with pytest.raises(Conflict, match=r"'alice'.*generation 1 over 0"):
        sessions.turn("alice", "slow", id_slot=0)
    assert sessions.store.load("alice")[0].tokens == 2


def test_what_is_stored_is_a_memory_as_the_server_saves_it(
    sessions: Sessions, server: FakeServer, tmp_path: Path
) -> None:
    sessions.start("alice")
    sessions.turn("alice", "hello")
    path = tmp_path / "copy.state"
    path.write_bytes(sessions.store.load("alice")[1] or b"")
    state = read_state(path, identity=IDENTITY, kinds=(MEMORY,))
    assert state.tokens_written.tolist() == [[2]]
