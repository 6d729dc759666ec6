"""Whose memory a request gets. The names say what a user would notice; each of these was red before (issue 13).

`tools/entitlement.py` mixes all of it at random and is run here for a minute; then come the cases as they were met.
"""

from __future__ import annotations

import stat
import time
from pathlib import Path
from typing import Any

import entitlement
import httpx
import numpy as np
import pytest
from entitled.memory import HEAD, Memory, differ, text_hash, with_values
from entitled.routes import ROUTES, Ask, answers, body_of, rendered
from entitled.wire import Pending
from http_client import chat, post, user
from server_runs import Running, ServeDemo
from state_files import edited

ACTIONS = ("memory-save", "memory-restore", "memory-reset", "memory-set", "save", "restore", "erase")
CHECKS = {"serial": 150, "fused": 250, "batched": 250, "batched-unified": 250, "stock-defaults": 200}


def act(running: Running, slot: int, action: str, **body: Any) -> dict[str, Any]:
    status, answer = post(running.server.url, f"/slots/{slot}?action={action}", body)
    assert status == 200, answer
    found: dict[str, Any] = answer
    return found


def refused(running: Running, path: str, body: Any) -> str:
    """The reason of a 400 or 409."""
    status, answer = post(running.server.url, path, body)
    assert status in (400, 409), answer
    return str(answer["error"]["message"])


def memory_in(running: Running, slot: int = 0) -> Memory:
    return Memory.of(act(running, slot, "memory-save", return_memory=True)["memory"])


def say(running: Running, text: str | list[dict[str, str]], **more: Any) -> str:
    answer = chat(running.server.url, user(text) if isinstance(text, str) else text, **more)
    return str(answer["said"])


def talk(turns: list[str]) -> list[dict[str, str]]:
    """What was said by turns, the user first and last."""
    return [{"role": ("user", "assistant")[i % 2], "content": said} for i, said in enumerate(turns)]


def learnt(running: Running, text: str, slot: int = 0) -> Memory:
    """The memory of somebody who said that; the slot is empty again."""
    act(running, slot, "erase")
    say(running, text, id_slot=slot)
    memory = memory_in(running, slot)
    act(running, slot, "erase")
    return memory


def text_of(told: dict[str, Any]) -> dict[str, Any]:
    """What a slot's memory began with and was told since: what a later save says that it continues."""
    return {name: told[name] for name in ("origin", "n_text", "text")}


def give(running: Running, slot: int, memory: Memory) -> None:
    act(running, slot, "memory-restore", memory=memory.base64)


def bare(serve_demo: ServeDemo, *extra: str) -> Running:
    """As llama-server starts by itself, given a model: four slots, one KV cache for all, idle ones cleared."""
    return serve_demo("batched", "--kv-unified", "--cache-idle-slots", *extra, parallel=4, ctx_size=2048)


# -- everything at random


@pytest.mark.slow
@pytest.mark.parametrize("profile", CHECKS)
def test_no_request_of_many_gets_another_memory_than_it_names(profile: str, tmp_path: Path) -> None:
    proof = entitlement.prove(profile, 1, CHECKS[profile], tmp_path, starts=2, shrink=20.0)
    assert proof.fault is None, str(proof)


# -- part 1: whose memory


@pytest.mark.parametrize("profile", ["fused", "batched"])
def test_a_stranger_is_not_told_whom_somebody_else_met(serve_demo: ServeDemo, profile: str) -> None:
    running, fresh = serve_demo(profile), serve_demo(profile)
    memory = learnt(running, "this is anna baker.")
    give(running, 0, memory)
    assert say(running, "who is anna?", id_slot=0) == "that is anna baker."
    questions = [
        "who is anna?",
        "this is anna wolf. who is anna?",
        "it is cold now. who is anna?",
        "hello. who is anna?",
    ]
    for question in questions * 5:
        said = say(running, question)
        assert said == say(fresh, question) and "baker" not in said
    assert say(running, "who is anna?", id_slot=0) == "that is anna baker."
    assert differ(memory_in(running), memory_after(fresh, memory, "who is anna?")) is None


def memory_after(running: Running, origin: Memory | None, text: str, **setting: Any) -> Memory:
    """By a request that carries all that decides it."""
    rwkv_ms = {"memory": origin.base64 if origin else None, "return_memory": True, **setting}
    return Memory.of(chat(running.server.url, user(text), rwkv_ms=rwkv_ms)["rwkv_ms"]["memory"])


def test_two_people_who_load_their_memories_are_told_their_own(serve_demo: ServeDemo) -> None:
    running = serve_demo("batched", parallel=2)
    for slot, surname in enumerate(("baker", "wolf")):
        give(running, slot, learnt(running, f"this is anna {surname}.", slot))
    for _ in range(3):
        assert [say(running, "who is anna?", id_slot=slot) for slot in (0, 1)] == [
            "that is anna baker.",
            "that is anna wolf.",
        ]


def test_a_new_chat_is_not_saved_over_the_memory_it_does_not_continue(serve_demo: ServeDemo, tmp_path: Path) -> None:
    running = serve_demo("fused")
    memory = learnt(running, "this is anna baker.")
    give(running, 0, memory)
    say(running, "this is tom fisher.", id_slot=0)
    first = act(running, 0, "memory-save", filename="solo.bin")
    # a save says what it goes on with: what it resumed, and what was said since
    goes_on = text_of(first)
    assert goes_on["origin"] == memory.origin
    say(running, talk(["this is tom fisher.", "ok.", "this is gina page."]), id_slot=0)
    second = act(running, 0, "memory-save", filename="solo.bin", continues=goes_on)
    assert second["n_text"] > first["n_text"]
    kept = (tmp_path / "solo.bin").read_bytes()
    goes_on = text_of(second)

    def is_refused() -> None:
        body = {"filename": "solo.bin", "continues": goes_on}
        assert "[state-continues]" in refused(running, "/slots/0?action=memory-save", body)
        assert (tmp_path / "solo.bin").read_bytes() == kept

    say(running, "this is kate wolf.", id_slot=0)  # New chat
    is_refused()
    act(running, 0, "erase")
    say(running, "this is kate wolf. " + "it is cold now. " * 20, id_slot=0)  # more tokens than before
    is_refused()
    act(running, 0, "memory-reset")
    is_refused()
    give(running, 0, learnt(running, "this is kate wolf."))
    is_refused()


def test_what_somebody_else_said_meanwhile_is_not_saved_as_mine(serve_demo: ServeDemo) -> None:
    running = serve_demo("fused")
    memory = learnt(running, "this is anna baker.")
    give(running, 0, memory)
    say(running, "this is tom fisher.", id_slot=0)
    mine = act(running, 0, "memory-save", return_memory=True)
    say(running, "this is kate wolf. this is gina page.")
    say(running, "remember ivan swan.", rwkv_ms={"memory": memory.base64}, id_slot=0)
    after = act(
        running, 0, "memory-save", return_memory=True, continues={k: mine[k] for k in ("origin", "n_text", "text")}
    )
    assert after["memory"] == mine["memory"] and after["text"] == mine["text"]


def test_a_server_started_anew_on_the_same_port_is_not_taken_for_the_old_one(serve_demo: ServeDemo) -> None:
    running = serve_demo("fused")
    give(running, 0, learnt(running, "this is anna baker."))
    say(running, "this is tom fisher.", id_slot=0)
    mine = act(running, 0, "memory-save", return_memory=True)
    port = running.server.record.port
    running.server.stop()
    running = serve_demo("fused", port=port)
    say(running, "this is kate wolf.", id_slot=0)  # a stranger
    body = {"return_memory": True, "continues": text_of(mine)}
    assert "[state-continues]" in refused(running, "/slots/0?action=memory-save", body)


def test_two_answers_at_once_take_no_slot_with_a_memory_in_it(serve_demo: ServeDemo) -> None:
    running = serve_demo("batched", parallel=2)
    memory = learnt(running, "this is anna baker.", slot=1)
    give(running, 1, memory)
    for body in ({"id_slot": 0}, {}, {"id_slot": 0, "stream": True}):
        asked = {"messages": user("who is tom?"), "n": 2, "temperature": 0, "max_tokens": 6, **body}
        response = httpx.post(f"{running.server.url}/v1/chat/completions", json=asked, timeout=20, trust_env=False)
        assert response.status_code in (200, 400, 409, 503)  # and in bounded time
        assert differ(memory_in(running, 1), memory) is None
    assert say(running, "who is anna?", id_slot=1) == "that is anna baker."


@pytest.mark.parametrize("profile", ["fused", "batched"])
def test_one_frozen_request_in_eight_leaves_the_others_their_memory(serve_demo: ServeDemo, profile: str) -> None:
    running, fresh = serve_demo(profile), serve_demo("fused", "--cache-ram", "0", "--ctx-checkpoints", "0")
    turns = ["this is kate wolf. this is gina page.", "ok.", "who is kate?"]
    say(running, talk(turns[:1]), rwkv_ms={"frozen": True})
    assert say(running, talk(turns)) == say(fresh, talk(turns), cache_prompt=False) == "that is kate wolf."
    wrong = 0
    for i in range(64):
        texts = [
            f"this is kate {'wolf fox bell'.split()[i % 3]}.",
            "ok.",
            "it is cold now. " * (i % 4) + "who is kate?",
        ]
        rwkv_ms = {"return_memory": True} | ({"frozen": True} if i % 8 == 0 else {})
        found = chat(running.server.url, talk(texts), rwkv_ms=rwkv_ms)
        expected = chat(fresh.server.url, talk(texts), rwkv_ms=rwkv_ms, cache_prompt=False)
        assert found["said"] == expected["said"]
        wrong += differ(*(Memory.of(one["rwkv_ms"]["memory"]) for one in (found, expected))) is not None
    assert wrong == 0


def test_a_text_that_was_read_at_another_scale_is_read_anew(serve_demo: ServeDemo) -> None:
    """In the slot, and out of the prompt cache in RAM."""
    running, fresh = serve_demo("fused", "--cache-ram", "64"), serve_demo("fused", "--cache-ram", "0")
    texts = ["this is kate wolf. this is gina page.", "this is kate bell. it is cold now.", "here is otto swan."]
    for scale in (0, 0.5, 1, 2, -1, 1):
        for text in texts:  # by turns, so that each is taken from the slot to the cache and back
            setting = {"scale": scale, "return_memory": True}
            found = chat(running.server.url, user(text), rwkv_ms=setting)["rwkv_ms"]
            assert differ(Memory.of(found["memory"]), memory_after(fresh, None, text, scale=scale)) is None


@pytest.mark.parametrize("emptied", ["memory-reset", "erase"])
def test_nothing_that_was_said_before_a_reset_comes_back(serve_demo: ServeDemo, emptied: str) -> None:
    running = serve_demo("fused", "-ub", "16", "--ctx-checkpoints", "8")
    long = "this is anna baker. " + "it is cold now. " * 20
    for memory in (learnt(running, "this is kate wolf."), None):
        if memory:
            give(running, 0, memory)
        empty = memory_after(running, None, long + "who is anna?")
        say(running, long + "who is kate?", id_slot=0)  # leaves text and checkpoints
        act(running, 0, emptied)
        assert memory_in(running).written == 0
        say(running, long + "who is anna?", id_slot=0)  # goes on with what they hold
        assert differ(memory_in(running), empty) is None


def test_a_slot_file_that_was_saved_at_scale_0_goes_on_at_scale_1_as_if_said_there(serve_demo: ServeDemo) -> None:
    running = serve_demo("fused")
    said, goes_on = user("this is anna baker."), talk(["this is anna baker.", "ok.", "who is anna?"])
    for setting in ({"scale": 0}, {"frozen": True}):
        act(running, 0, "erase")
        act(running, 0, "memory-set", **setting)
        say(running, said, id_slot=0)
        act(running, 0, "save", filename="slot.bin")
        act(running, 0, "erase")
        act(running, 0, "restore", filename="slot.bin")
        found = chat(running.server.url, goes_on, id_slot=0)
        act(running, 0, "erase")
        expected = chat(running.server.url, goes_on, id_slot=0, cache_prompt=False)
        assert found["said"] == expected["said"] == "that is anna baker."


def test_a_slot_that_has_just_given_one_of_n_answers_goes_on_with_what_is_restored_to_it(serve_demo: ServeDemo) -> None:
    """The KV cache of the first answer was copied to it by the next request: over what had been restored meanwhile."""
    running = serve_demo("batched", parallel=4, ctx_size=2048)
    turns = ["this is anna baker. who is anna?", "that", "who is anna?"]
    say(running, talk(turns[:1]), id_slot=1, max_tokens=1)
    act(running, 1, "save", filename="slot.bin")
    prompt = rendered(("this is kate wolf. who is kate?",))[5:]
    several = {"prompt": prompt, "n": 4, "n_predict": 1, "temperature": 0, "cache_prompt": False}
    assert post(running.server.url, "/completion", several)[0] == 200
    act(running, 1, "restore", filename="slot.bin")
    rwkv_ms = {"return_memory": True}
    found = chat(running.server.url, talk(turns), id_slot=1, rwkv_ms=rwkv_ms)
    assert found["rwkv_ms"]["reused"] > 10
    expected = chat(running.server.url, talk(turns), rwkv_ms=rwkv_ms, cache_prompt=False)
    assert found["said"] == expected["said"]
    assert differ(*(Memory.of(one["rwkv_ms"]["memory"]) for one in (found, expected))) is None


@pytest.mark.parametrize("given", [True, False])
def test_what_an_idle_slot_learnt_is_saved(serve_demo: ServeDemo, given: bool) -> None:
    running = bare(serve_demo)
    memory = learnt(running, "this is anna baker.")
    if given:
        give(running, 0, memory)
    say(running, "this is tom fisher.", id_slot=0)
    mine = memory_in(running)
    assert mine.written > (memory.written if given else 0)
    for text in ("hello", "it is cold now.", "this is kate wolf. " + "it is cold now. " * 30):
        say(running, text)  # the text of idle slots makes room
    assert differ(memory_in(running), mine) is None
    give(running, 1, mine)
    assert say(running, "who is tom?", id_slot=1) == "that is tom fisher."


def test_what_a_slot_learnt_outlives_a_sleep(serve_demo: ServeDemo) -> None:
    running = serve_demo("batched", "--sleep-idle-seconds", "1", parallel=2)
    memory = learnt(running, "this is anna baker.", slot=1)
    give(running, 1, memory)
    say(running, "this is tom fisher.", id_slot=1)
    mine = memory_in(running, 1)
    time.sleep(2.5)
    assert differ(memory_in(running, 1), mine) is None
    assert say(running, "who is anna?", id_slot=1) == "that is anna baker."


@pytest.mark.parametrize("slot", [4, 7, 99, -1])
def test_a_slot_that_is_not_there_is_not_another_one(serve_demo: ServeDemo, slot: int) -> None:
    running = serve_demo("batched", parallel=4)
    give(running, 3, learnt(running, "this is anna baker.", slot=3))
    before = memory_in(running, 3)
    (Path(str(running.server.record.slot_dir)) / "m.bin").write_bytes(before.data)
    for action in ACTIONS:
        refused(running, f"/slots/{slot}?action={action}", {"filename": "m.bin", "frozen": True})
    for route in ROUTES:
        if slot != -1:  # which says that the server chooses
            refused(running, route, body_of(Ask(route, ("hello",), 2, slot=slot), ()))
    assert memory_in(running, 3) == before
    assert running.client.slots()[3]["rwkv_ms"]["frozen"] is False


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("stream", [False, True])
def test_every_route_reads_the_memory_that_it_is_given(serve_demo: ServeDemo, route: str, stream: bool) -> None:
    running = serve_demo("batched", parallel=2)
    memory = learnt(running, "this is anna baker.")
    for slot in (None, 1):
        ask = Ask(route, ("who is anna?",), 8, slot=slot, memory=memory, return_memory=True, stream=stream)
        (said,) = answers(ask, Pending(address(running), "POST", route, body_of(ask, ())).result())
        assert said.text.strip() == "that is anna baker."
        assert said.rwkv_ms and said.rwkv_ms["origin"] == memory.origin
        assert said.memory and said.memory.written > memory.written
    for wrong in (
        {"memory": 3},
        {"memory": "%"},
        {"frozen": "yes"},
        {"scale": "1"},
        {"scale": 1e38},
        {"else": 1},
        [1],
        "x",
    ):
        refused(running, route, body_of(Ask(route, ("hello",), 2), ()) | {"rwkv_ms": wrong})
    for wrong_slot in ("1", 1.5, [0]):
        refused(running, route, body_of(Ask(route, ("hello",), 2), ()) | {"id_slot": wrong_slot})


def address(running: Running) -> tuple[str, int]:
    host, _, port = running.server.url.removeprefix("http://").partition(":")
    return host, int(port)


def test_what_a_route_cannot_do_is_refused(serve_demo: ServeDemo) -> None:
    running = serve_demo("fused")
    refused(running, "/completion", {"prompt": "hello", "n_predict": 1, "n": 2, "rwkv_ms": {"return_memory": True}})


def test_a_setting_does_not_outlive_the_conversation_it_was_made_for(serve_demo: ServeDemo, tmp_path: Path) -> None:
    running = serve_demo("fused")
    memory = learnt(running, "this is kate wolf.")
    act(running, 0, "save", filename="slot.bin")
    ends: list[tuple[str, dict[str, Any]]] = [
        ("erase", {}),
        ("memory-reset", {}),
        ("restore", {"filename": "slot.bin"}),
    ]
    for end, body in [*ends, ("memory-restore", {"memory": memory.base64})]:
        act(running, 0, "memory-set", frozen=True, scale=0)
        act(running, 0, end, **body)
        told = running.client.slots()[0]["rwkv_ms"]
        assert (told["frozen"], told["scale"]) == (False, 1)
        before = memory_in(running).written
        say(running, "this is anna baker. who is anna?", id_slot=0)
        assert memory_in(running).written > before


def test_memories_are_for_the_eyes_of_their_owner(serve_demo: ServeDemo, tmp_path: Path) -> None:
    running = serve_demo("fused")
    say(running, "this is anna baker.", id_slot=0)
    for name, action in (("memory.bin", "memory-save"), ("slot.bin", "save")):
        for _ in range(2):  # also over a file that is there
            act(running, 0, action, filename=name)
            assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
            (tmp_path / name).chmod(0o644)
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {"memory.bin", "slot.bin"}


def test_the_first_words_after_an_erase_take_time(serve_demo: ServeDemo) -> None:
    running = serve_demo("fused")
    for action in ("erase", "memory-reset"):
        for text in ("this is anna baker. " * 8, "it is cold now. " * 8):
            timings = chat(running.server.url, user(text), id_slot=0)["timings"]
            assert timings["prompt_ms"] > 0.01 and timings["prompt_per_second"] < 1e6, timings
            act(running, 0, action)


def test_an_embedding_is_that_of_its_text_whatever_memory_a_slot_holds(serve_demo: ServeDemo) -> None:
    running, talks = serve_demo("fused", "--embeddings", "--pooling", "mean"), serve_demo("fused")
    memory = learnt(talks, "this is anna baker.")

    def embedding() -> np.ndarray:
        status, answer = post(running.server.url, "/v1/embeddings", {"input": "who is anna?"})
        assert status == 200, answer
        return np.array(answer["data"][0]["embedding"])

    before = embedding()
    give(running, 0, memory)
    assert np.allclose(embedding(), before, atol=1e-5)
    refused(running, "/v1/embeddings", {"input": "who is anna?", "rwkv_ms": {"memory": memory.base64}})


# -- part 4: what no request may do


COLD = "it is cold now. " * 12


def longs(running: Running) -> list[str]:
    return [
        say(running, "this is anna baker. " + "it is cold now. " * n + "who is anna?", id_slot=0) for n in (2, 25, 60)
    ]


@pytest.mark.parametrize(
    "extra", [[], ["--kv-unified"], ["-fa", "off"]], ids=["", "one cache for all", "no flash attention"]
)
def test_a_memory_of_huge_values_harms_nobody_after_it(serve_demo: ServeDemo, extra: list[str]) -> None:
    running = serve_demo("batched", *extra, parallel=2, ctx_size=2048)
    expected = longs(running)
    memory = learnt(running, "this is anna baker.")
    for value in (3.4e38, -3.4e38, 1e25, 1e12):
        for poisoned in (with_values(memory, value), with_source(memory, value)):
            path = "/v1/chat/completions"
            body = {"messages": user(COLD), "temperature": 0, "max_tokens": 6}
            carried = {"rwkv_ms": {"memory": poisoned.base64, "return_memory": True}}
            found = [post(running.server.url, path, body | carried | {"id_slot": 0})]
            assert longs(running) == expected  # at once, and where it ran
            found.append(post(running.server.url, path, body | carried))
            if post(running.server.url, "/slots/0?action=memory-restore", {"memory": poisoned.base64})[0] == 200:
                found.append(post(running.server.url, path, body | {"id_slot": 0}))
                saved = post(running.server.url, "/slots/0?action=memory-save", {"return_memory": True})
                assert saved[0] == 200 or "[state-values]" in saved[1]["error"]["message"]
                found += [(200, {"rwkv_ms": saved[1]})] if saved[0] == 200 else []
            for status, answer in found:
                if status != 200:
                    assert "[state-values]" in answer["error"]["message"]
                elif data := answer.get("rwkv_ms", {}).get("memory"):
                    assert np.isfinite(Memory.of(data).values).all()
            act(running, 0, "erase")
            assert longs(running) == expected
            assert running.server.process.poll() is None


def with_source(memory: Memory, value: float) -> Memory:
    """The same file with that in the source of the last token, and right checksums."""
    values = memory.values.copy()
    values[:, -10:-2] = value  # of rank 8
    data = memory.data[:HEAD] + values.tobytes() + memory.data[HEAD + values.nbytes :]
    return Memory(edited(data, {}))


@pytest.mark.parametrize("scale", [3e38, 1e38, 17, -16.01, 1e39])
def test_a_scale_without_bounds_is_refused_and_ends_no_server(serve_demo: ServeDemo, scale: float) -> None:
    running = serve_demo("fused")
    expected = longs(running)
    for path, body in (
        ("/completion", {"prompt": "this is anna", "n_predict": 4, "rwkv_ms": {"scale": scale}}),
        ("/slots/0?action=memory-set", {"scale": scale}),
    ):
        assert "scale" in refused(running, path, body)
    assert longs(running) == expected  # which edits the text before
    assert running.server.process.poll() is None


def stream(running: Running, slot: int, n: int = 250) -> Pending:
    """A long answer in that slot, of which the first piece has come."""
    body = {"prompt": "hello", "n_predict": n, "ignore_eos": True, "stream": True, "id_slot": slot, "temperature": 0}
    pending = Pending(address(running), "POST", "/completion", body)
    pending.first()
    return pending


def at_once(running: Running, *requests: tuple[str, Any]) -> list[Pending]:
    """Requests in this order, each at the server before the next one is sent."""
    sent = []
    for path, body in requests:
        sent.append(Pending(address(running), "POST", path, body))
        time.sleep(0.03)
    return sent


def test_actions_for_two_busy_slots_are_both_answered(serve_demo: ServeDemo) -> None:
    running = serve_demo("batched", parallel=4, ctx_size=4096)
    busy = [stream(running, slot, 400) for slot in (2, 3)]
    save = {"return_memory": True}
    saves = at_once(running, ("/slots/3?action=memory-save", save), ("/slots/2?action=memory-save", save))
    for one in busy:
        assert one.result().status == 200
    replies = [one.result() for one in saves]
    assert [(reply.status, reply.body["id_slot"]) for reply in replies] == [(200, 3), (200, 2)]


def test_an_action_does_not_land_in_the_next_conversation(serve_demo: ServeDemo) -> None:
    running = serve_demo("batched", parallel=2, ctx_size=2048)
    memory = learnt(running, "this is anna baker.")
    busy = stream(running, 0)
    asked = {"messages": user("who is anna?"), "id_slot": 0, "temperature": 0, "max_tokens": 8}
    restore = ("/slots/0?action=memory-restore", {"memory": memory.base64})
    restored, answered = at_once(running, restore, ("/v1/chat/completions", asked))
    assert busy.result().status == 200
    assert restored.result().status == 200
    assert answered.result().body["choices"][0]["message"]["content"].strip() == "that is anna baker."
    assert memory_in(running).written > memory.written  # the conversation is in it: the restore did not come after


def test_a_request_that_waits_for_a_busy_slot_leaves_the_answer_there_alone(serve_demo: ServeDemo) -> None:
    """Met as garbled answers of others, and as a failed assertion that ended the server."""
    running = serve_demo("batched", parallel=2)
    long = {"prompt": rendered(("this is anna baker.",))[5:], "n_predict": 100, "ignore_eos": True, "temperature": 0}

    def answer(slot: int, *waiting: dict[str, Any]) -> tuple[str, list[int]]:
        act(running, slot, "erase")
        busy = Pending(address(running), "POST", "/completion", long | {"stream": True, "id_slot": slot})
        busy.first()
        waits = at_once(running, *[("/v1/chat/completions", body | {"id_slot": slot}) for body in waiting])
        said = "".join(event["content"] for event in busy.result().events or [])
        return said, [one.result().status for one in waits]

    short = {"messages": user("who is anna?"), "temperature": 0, "max_tokens": 6}
    for text in ("who is anna?", "this is anna baker."):  # now in the prompt cache
        say(running, text)
        say(running, "it is cold now. " * 12)
    expected = answer(0)[0]
    for i in range(8):
        assert answer(i % 2, short, short) == (expected, [200, 200])
    assert running.server.process.poll() is None


def test_an_action_whose_client_gave_up_changes_nothing(serve_demo: ServeDemo) -> None:
    running = serve_demo("batched", parallel=2, ctx_size=4096)
    memory = learnt(running, "this is anna baker.")
    give(running, 0, memory)
    busy = stream(running, 0, 400)
    for action in ("memory-reset", "erase"):
        gives_up = Pending(address(running), "POST", f"/slots/0?action={action}", {})
        time.sleep(0.03)
        gives_up.close()
    busy.result()
    time.sleep(0.2)
    told = act(running, 0, "memory-save", return_memory=True)
    assert told["origin"] == memory.origin and told["tokens_written"] > memory.written + 300


def test_an_action_says_in_time_that_its_slot_is_busy(serve_demo: ServeDemo) -> None:
    running = serve_demo("batched", parallel=2, ctx_size=4096)
    busy = stream(running, 0, 800)
    began = time.monotonic()
    assert "[slot-busy]" in refused(running, "/slots/0?action=memory-reset", {"timeout": 0.1})
    assert time.monotonic() - began < 5
    busy.result()
    assert memory_in(running).written > 700


def test_a_text_is_known_by_its_hash(serve_demo: ServeDemo) -> None:
    """What `/slots`, a save and `continues` mean by `text`: SHA-256 of the token ids since the origin, as i32."""
    running = serve_demo("fused")
    ids = tuple(running.client.tokenize(rendered(("this is anna baker.",)), add_special=False, parse_special=True))
    running.client.completion(list(ids), n_predict=1, id_slot=0)
    saved = act(running, 0, "memory-save", return_memory=True)
    assert (saved["n_text"], saved["text"], saved["origin"]) == (len(ids), text_hash(ids), None)
    told = running.client.slots()[0]["rwkv_ms"]
    assert {name: told[name] for name in ("n_text", "text", "origin")} == {
        name: saved[name] for name in ("n_text", "text", "origin")
    }
