"""Chats with a real server: what is streamed, what is remembered, and what an interrupt leaves."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from server_runs import Running, Serve

from llamamem.errors import LlamamemError
from llamamem.sessions import Chat, DirectoryStore, Sessions

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}


def begin(running: Running, tmp_path: Path, **options: Any) -> Chat:
    sessions = Sessions(running.client, DirectoryStore(tmp_path / "store"))
    return Chat(running.client, sessions=sessions, **(GREEDY | options))


def ask(chat: Chat, text: str) -> tuple[str, dict[str, Any]]:
    deltas = list(chat.ask(text))
    timings = next(delta.timings for delta in reversed(deltas) if delta.timings)
    return "".join(delta.text for delta in deltas), timings


@pytest.mark.parametrize("profile", ["base", "serial", "fused", "batched"])
def test_what_is_streamed_is_what_is_answered_at_once(serve: Serve, tmp_path: Path, profile: str) -> None:
    running = serve(profile)
    chat = begin(running, tmp_path)
    for question in ("hello there", "what is the colour of the garden?"):
        said, _ = ask(chat, question)
        whole = running.client.chat(chat.messages[:-1], cache_prompt=False, max_tokens=12)
        assert said == whole["choices"][0]["message"]["content"] != ""


@pytest.mark.parametrize("profile", ["serial", "batched"])
def test_save_and_load_in_another_server_go_on_alike(serve: Serve, tmp_path: Path, profile: str) -> None:
    here, there = begin(serve(profile), tmp_path), begin(serve(profile), tmp_path)
    ask(here, "hello there, I keep bees and two goats")
    fresh, _ = ask(there, "what do I keep?")
    saved = here.save("anna")
    written = here.memory()
    assert saved.tokens == written.tokens_written > 0 and all(norm > 0 for norm in written.norms)
    there.load("anna")
    here.load("anna")
    assert there.memory() == written
    (first, timings), (second, _) = ask(there, "what do I keep?"), ask(here, "what do I keep?")
    assert first == second != fresh, "the memory is read, and is the same in both"
    assert there.memory().tokens_written == saved.tokens + timings["prompt_n"] + timings["predicted_n"] - 1
    there.reset()
    assert there.memory().tokens_written == 0 and ask(there, "what do I keep?")[0] == fresh


def test_a_follow_up_does_not_read_the_text_again(serve: Serve, tmp_path: Path) -> None:
    # The template of model_a calls its own answers something else once they are said; Gemma's does not.
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}{% if add_generation_prompt %}"
    running = serve("serial", "--jinja", "--chat-template", template + "<assistant>{% endif %}")
    chat = begin(running, tmp_path, logit_bias=[[token, False] for token in range(448) if token != 305])  # says X
    _, first = ask(chat, "hello there")
    _, second = ask(chat, "and now?")
    assert chat.messages[1]["content"] == 12 * "X" and first["cache_n"] == 0
    assert second["cache_n"] == first["prompt_n"] + 11
    assert chat.memory().tokens_written == second["cache_n"] + second["prompt_n"] + 11


def test_an_interrupt_ends_the_answer_on_the_server_too(serve: Serve, tmp_path: Path) -> None:
    running = serve("serial", ctx_size=8192)
    chat = begin(running, tmp_path, max_tokens=8000, ignore_eos=True)
    answer = chat.ask("hello there")
    said = ""
    while not said:
        said += next(answer).text
    answer.close()
    end = time.monotonic() + 30
    while (slot := running.client.slots()[0])["is_processing"]:
        assert time.monotonic() < end, "it still answers"
    assert slot["next_token"][0]["n_decoded"] < 7000
    assert chat.messages[-1]["content"] == said
    chat.options["max_tokens"] = 4
    ask(chat, "go on")
    assert chat.save("after").generation == 1


def test_a_full_context_is_an_error_of_one_line_and_the_chat_goes_on(serve: Serve, tmp_path: Path) -> None:
    chat = begin(serve("serial", ctx_size=256), tmp_path)
    with pytest.raises(LlamamemError, match="exceed"):
        ask(chat, "hello there " * 200)
    assert chat.messages == [] and ask(chat, "hello there")[0]


def test_a_script_as_a_user_runs_it(serve: Serve, tmp_path: Path) -> None:
    running = serve("fused")
    script = "hello there\n/memory\n/save anna\n/reset\n/load anna\n/memory\n"
    command = [sys.executable, "-m", "llamamem.cli", "chat", "--url", running.client.url]
    command += ["--store", tmp_path / "store", "--temperature", "0", "--max-tokens", "5"]
    done = subprocess.run([*map(str, command)], input=script, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    before, after = (line for line in done.stdout.splitlines() if " tokens written; " in line)
    assert before.split(";")[0] == after.split(";")[0] and "session 'anna', generation 1" in after
    assert "'anna' saved: generation 1" in done.stderr and "'anna' loaded: generation 1" in done.stderr


@pytest.mark.parametrize("profile", ["serial", "fused", "batched"])
def test_two_chats_and_a_stranger_at_one_server_know_nothing_of_each_other(
    serve: Serve, tmp_path: Path, profile: str
) -> None:
    running = serve(profile)
    question = "what is the name of my dog?"
    fresh = running.client.chat([{"role": "user", "content": question}], max_tokens=12)["choices"][0]["message"]
    first, second = begin(running, tmp_path), begin(running, tmp_path)
    ask(first, "my dog is called rex and he is three years old")
    first.save("anna")
    first.load("anna")
    on_it, _ = ask(first, question)
    assert second.memory().tokens_written == 0 and ask(second, question)[0] == fresh["content"] != on_it
    stranger = running.client.chat([{"role": "user", "content": question}], max_tokens=12)
    assert stranger["choices"][0]["message"]["content"] == fresh["content"]
    assert not any(slot["rwkv_ms"]["given"] for slot in running.client.slots()), "no slot was taken"


def test_the_memory_after_an_interrupt_is_that_of_what_was_said(serve: Serve, tmp_path: Path) -> None:
    running = serve("serial", ctx_size=4096)
    chat = begin(running, tmp_path, max_tokens=3000, ignore_eos=True)
    answer = chat.ask("hello there")
    said = ""
    while not said:
        said += next(answer).text
    answer.close()
    prompt = running.client.apply_template(chat.messages, add_generation_prompt=False)
    assert chat.memory().tokens_written == len(running.client.tokenize(prompt, add_special=True, parse_special=True))
