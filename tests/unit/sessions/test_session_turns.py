"""Turns: resume, ask, save in one call, and what may happen in between."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import filelock
import pytest
from fake_memory_server import IDENTITY, FakeServer, Slot, die, refuse, wait_for

from llamamem.errors import LlamamemError
from llamamem.formats.state import MEMORY, read_state
from llamamem.serving.client import Client
from llamamem.sessions import Conflict, Memory, Sessions

MakeMemory = Callable[..., Memory]

TURN = ["memory-restore", "completion", "memory-save"]


def test_a_turn_resumes_asks_and_saves(sessions: Sessions, server: FakeServer) -> None:
    sessions.start("alice")
    first = sessions.turn("alice", "one two", 3)
    server.asked.clear()
    second = sessions.turn("alice", [11, 12, 13], 1, n_predict=5)
    third = sessions.turn("alice", [{"role": "user", "content": "and now"}], 0)
    assert server.actions == TURN * 2
    body = server.asked[1][1]
    assert (body["id_slot"], body["cache_prompt"], body["n_predict"]) == (1, False, 5)
    assert body["prompt"] == [11, 12, 13] and server.asked[4][1]["messages"][0]["content"] == "and now"
    alone = Slot()
    for words, answer in ((["one", "two"], first), (["11", "12", "13"], second), (["and", "now"], third)):
        alone.read(words)
        assert answer["content"] == f"{alone.value:06x}"
        alone.read([answer["content"]])
    loaded, _ = sessions.store.load("alice")
    assert (loaded.generation, loaded.tokens) == (3, alone.tokens)
    assert server.left == []


def test_64_sessions_take_turns_over_4_slots(sessions: Sessions, server: FakeServer) -> None:
    """Each gets the answers that it gets alone, whoever was in the slot before."""
    names = [f"session {i}" for i in range(64)]
    prefix = sessions.start("prefix")
    sessions.turn("prefix", "what all of them know", 0)
    for i, name in enumerate(names):
        sessions.start(name, "prefix" if i % 2 else None)
    jobs = [(name, turn) for turn in range(3) for name in names]

    def play(job: tuple[int, tuple[str, int]]) -> tuple[str, int, str]:
        i, (name, turn) = job
        return name, turn, sessions.turn(name, f"{name} says {turn}", i % 4)["content"]

    answers = [play(job) for job in enumerate(jobs)]
    with ThreadPoolExecutor(8) as pool:
        answers += list(pool.map(play, [(i + 1, (name, 3)) for i, name in enumerate(names)]))
    assert prefix.generation == 0 and len(answers) == 256
    for i, name in enumerate(names):
        alone = Slot()
        if i % 2:
            alone.read(["what", "all", "of", "them", "know"])
            alone.read([f"{alone.value:06x}"])
        for turn in range(4):
            alone.read(f"{name} says {turn}".split())
            assert [said for n, t, said in answers if (n, t) == (name, turn)] == [f"{alone.value:06x}"]
            alone.read([f"{alone.value:06x}"])
    assert server.left == []


def test_turns_in_one_slot_wait_for_each_other(sessions: Sessions, server: FakeServer) -> None:
    """The slot is busy from the resume to the save of a turn, also for another process: it is a file lock."""
    server.before["completion"] = lambda _: time.sleep(0.02)
    for i in range(6):
        sessions.start(f"s{i}")
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda i: sessions.turn(f"s{i}", f"text {i}", 0)["content"], range(6)))
    for i, answer in enumerate(answers):
        alone = Slot()
        alone.read(["text", str(i)])
        assert answer == f"{alone.value:06x}"


def test_a_slot_that_is_held_on_and_on_is_an_error(sessions: Sessions, server: FakeServer) -> None:
    sessions.start("alice")
    sessions.wait = 0.1
    port = sessions.client.url.port
    with filelock.FileLock(server.slot_dir / f".llamamem-{port}-slot-0.lock"):
        with pytest.raises(LlamamemError, match="slot 0: another process"):
            sessions.turn("alice", "hello", 0)
        sessions.turn("alice", "hello", 1)


def test_a_busy_slot_is_waited_for_and_then_given_up(sessions: Sessions, server: FakeServer) -> None:
    sessions.start("alice")
    sessions.turn("alice", "hello", 0)
    before = sessions.store.load("alice")
    release = threading.Event()
    server.before["memory-restore"] = lambda _: release.wait(10)
    with (
        Client(server.url, timeout=0.2) as hurried,
        pytest.raises(LlamamemError, match=r"ReadTimeout.*is the server running"),
    ):
        Sessions(hurried, sessions.store, server.slot_dir).turn("alice", "more", 0)
    release.set()
    server.before.clear()
    loaded, state = sessions.store.load("alice")
    assert (loaded.generation, state) == (before[0].generation, before[1])
    wait_for(lambda: not server.slots[0].lock.locked())
    assert server.left == []
    sessions.turn("alice", "more", 0)


@pytest.mark.parametrize("action", ["memory-restore", "completion", "memory-save"])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_server_that_dies_in_a_turn_leaves_the_session(
    sessions: Sessions, server: FakeServer, action: str, moment: str
) -> None:
    sessions.start("alice")
    sessions.turn("alice", "hello", 0)
    sessions.resume("alice", 0)
    loaded, state = sessions.store.load("alice")
    getattr(server, moment)[action] = die
    with pytest.raises(LlamamemError, match="is the server running"):
        sessions.turn("alice", "more", 0)
    getattr(server, moment).clear()
    again, unchanged = sessions.store.load("alice")
    assert (again.generation, unchanged) == (loaded.generation, state)
    assert server.left == []
    with pytest.raises(LlamamemError, match="holds no session"):
        sessions.save("alice", 0), "what the slot has now is half a turn"


@pytest.mark.parametrize("action", ["memory-restore", "completion", "memory-save"])
def test_the_text_of_a_refusal_is_shown_as_it_is(sessions: Sessions, server: FakeServer, action: str) -> None:
    sessions.start("alice")
    sessions.turn("alice", "hello", 0)
    loaded, state = sessions.store.load("alice")
    text = "state 'x': [state-checksum] the block has another hash; save it again"
    server.before[action] = refuse(text)
    with pytest.raises(LlamamemError) as refused:
        sessions.turn("alice", "more", 0)
    assert f"answered 400: {text}" in str(refused.value) and refused.value.exit_status == 2
    again, unchanged = sessions.store.load("alice")
    assert (again.generation, unchanged) == (loaded.generation, state)
    assert server.left == []


@pytest.mark.parametrize("spoil", [lambda d: d[:-1], lambda d: d[:400] + b"\xff" + d[401:], lambda d: b""])
def test_a_damaged_file_of_the_server_is_not_saved(
    sessions: Sessions, server: FakeServer, spoil: Callable[[bytes], bytes]
) -> None:
    sessions.start("alice")
    sessions.turn("alice", "hello", 0)
    before = sessions.store.load("alice")[1]
    whole = server.save

    def save(slot: Slot, body: dict[str, Any]) -> dict[str, Any]:
        answer = whole(slot, body)
        path = server.slot_dir / body["filename"]
        path.write_bytes(spoil(path.read_bytes()))
        return answer

    server.save = save  # type: ignore[method-assign]
    with pytest.raises(LlamamemError, match="state-") as refused:
        sessions.turn("alice", "more", 0)
    assert refused.value.reason in ("state-truncated", "state-checksum", "state-format")
    assert sessions.store.load("alice")[1] == before and server.left == []


def test_a_turn_that_something_else_was_in_is_not_saved(sessions: Sessions, server: FakeServer) -> None:
    sessions.start("alice")
    sessions.turn("alice", "hello", 0)
    before = sessions.store.load("alice")[1]
    for hooks, disturb in (
        (server.before, lambda slot: server.erase(slot, {})),
        (server.before, lambda slot: slot.read(["an", "intruder", "writes"])),  # whose text is dropped with the memory
        (server.after, lambda slot: slot.read(["an", "intruder", "writes"])),
    ):
        hooks["completion"] = disturb
        with pytest.raises(LlamamemError, match=r"something else used the slot.*nothing was saved"):
            sessions.turn("alice", "more text", 0)
        hooks.clear()
    assert sessions.store.load("alice")[1] == before
    sessions.turn("alice", "more text", 0)


def test_a_prompt_that_was_reused_in_part_is_not_saved(sessions: Sessions, server: FakeServer) -> None:
    """Reused text comes with the memory that was saved with it, not with that of the session."""
    sessions.start("alice")
    whole = server.complete

    def complete(slot: Slot, body: dict[str, Any]) -> dict[str, Any]:
        answer = whole(slot, body)
        answer["timings"] |= {"cache_n": 2}
        return answer

    server.complete = complete  # type: ignore[method-assign]
    with pytest.raises(LlamamemError, match="2 reused"):
        sessions.turn("alice", "hello", 0)
    server.complete = lambda slot, body: {"content": ""}  # type: ignore[method-assign]
    with pytest.raises(LlamamemError, match="no timings"):
        sessions.turn("alice", "hello", 0)
    assert sessions.store.load("alice")[1] is None


def test_a_frozen_turn_reads_and_saves_nothing(sessions: Sessions, server: FakeServer) -> None:
    sessions.start("alice")
    sessions.turn("alice", "hello", 0)
    loaded, state = sessions.store.load("alice")
    server.asked.clear()
    one = sessions.turn("alice", "question", 0, rwkv_ms={"frozen": True})
    two = sessions.turn("alice", "question", 1, rwkv_ms={"frozen": True})
    assert one["content"] == two["content"]
    assert server.actions == TURN[:2] * 2 and server.asked[1][1]["rwkv_ms"] == {"frozen": True, "scale": 1.0}
    again, unchanged = sessions.store.load("alice")
    assert (again.generation, unchanged) == (loaded.generation, state)


def test_a_turn_does_not_depend_on_what_the_slot_was_set_to(sessions: Sessions, server: FakeServer) -> None:
    sessions.start("alice")
    sessions.turn("alice", "hello", 0)
    sessions.turn("alice", "hello", 0, rwkv_ms={"scale": 0.5})
    sent = [body["rwkv_ms"] for action, body in server.asked if action == "completion"]
    assert sent == [{"frozen": False, "scale": 1.0}, {"frozen": False, "scale": 0.5}]


@pytest.mark.parametrize("option", ["id_slot", "cache_prompt", "stream", "n", "n_cmpl"])
def test_what_a_turn_sets_itself_cannot_be_given(sessions: Sessions, server: FakeServer, option: str) -> None:
    sessions.start("alice")
    with pytest.raises(LlamamemError, match=f"sets {option} itself"):
        sessions.turn("alice", "hello", 0, **{option: 1})
    assert server.asked == []


def test_of_two_turns_of_one_session_the_later_save_is_told(sessions: Sessions, server: FakeServer) -> None:
    sessions.start("alice")
    answers: list[str] = []
    first = threading.Event()

    def in_between(slot: Slot) -> None:
        if slot is server.slots[0]:
            answers.append(sessions.turn("alice", "quick", 1)["content"])
            first.set()

    server.before["completion"] = in_between
    with pytest.raises(Conflict, match=r"'alice'.*generation 1 over 0"):
        sessions.turn("alice", "slow", 0)
    assert first.is_set() and sessions.store.load("alice")[0].tokens == 2
    assert f"{answers[0]}" and server.left == []


def test_what_is_stored_is_the_servers_file(sessions: Sessions, server: FakeServer, tmp_path: Any) -> None:
    sessions.start("alice")
    sessions.turn("alice", "hello", 0)
    path = tmp_path / "copy.state"
    path.write_bytes(sessions.store.load("alice")[1] or b"")
    state = read_state(path, identity=IDENTITY, kinds=(MEMORY,))
    assert state.tokens_written.tolist() == [[2]]
