"""`llamamem chat` and the conversation behind it, over the stand-in of a server with a memory."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import pty
import select
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_memory_server import FakeServer, Learnt, Slot, refuse

from llamamem.errors import LlamamemError
from llamamem.sessions import Chat, Conflict, DirectoryStore, Sessions

Run = Callable[..., Any]


@pytest.fixture
def chat(sessions: Sessions) -> Chat:
    return Chat(sessions.client, sessions=sessions)


def ask(chat: Chat, text: str) -> str:
    return "".join(delta.text for delta in chat.ask(text))


def test_an_answer_comes_in_pieces_and_is_part_of_the_text(chat: Chat, server: FakeServer) -> None:
    pieces = [delta.text for delta in chat.ask("hello there")]
    assert len([piece for piece in pieces if piece]) > 1
    assert chat.messages == [
        {"role": "user", "content": "hello there"},
        {"role": "assistant", "content": "".join(pieces)},
    ]
    ask(chat, "and now")
    _, request = server.asked[-1]
    assert [m["content"] for m in request["messages"]] == ["hello there", "".join(pieces), "and now"]
    assert request["cache_prompt"] is True and "id_slot" not in request
    assert chat.memory().tokens_written == 2 + 1 + 2 + 1, "what was said is not written twice"


def test_a_second_chat_neither_sees_nor_disturbs_the_first_one(sessions: Sessions, server: FakeServer) -> None:
    first, second = (Chat(sessions.client, sessions=sessions) for _ in range(2))
    alone = ask(Chat(sessions.client, sessions=sessions), "who is anna?")
    ask(first, "this is anna baker.")
    first.save("anna")
    first.load("anna")
    ask(first, "who is anna?")
    before = first.memory()
    assert second.session is None and second.memory().tokens_written == 0
    assert ask(second, "who is anna?") == alone, "as if nobody had told it"
    assert first.memory() == before
    assert sessions.client.completion("who is anna?")["content"] == alone, "nor does who knows nothing of chats"


def test_a_chat_leaves_nothing_in_the_server(sessions: Sessions, server: FakeServer) -> None:
    chat = Chat(sessions.client, sessions=sessions)
    ask(chat, "this is anna baker.")
    chat.save("anna")
    chat.load("anna")
    ask(chat, "who is anna?")
    assert set(server.actions) == {"completion"}
    assert not any(slot.given or slot.tokens for slot in server.slots)


def test_a_chat_in_a_slot_of_its_choice_leaves_what_the_slot_was_given(sessions: Sessions, server: FakeServer) -> None:
    alone = ask(Chat(sessions.client, sessions=sessions), "hello")
    sessions.start("anna")
    sessions.turn("anna", "I keep bees")
    sessions.resume("anna", 1)
    assert ask(Chat(sessions.client, slot=1, sessions=sessions), "hello") == alone
    assert server.asked[-1][1]["id_slot"] == 1
    assert sessions.save("anna", 1).tokens == 4


def test_save_and_load_carry_the_memory_and_drop_the_text(chat: Chat) -> None:
    ask(chat, "I keep bees")
    kept = chat.memory()
    assert chat.save("anna").generation == 1
    ask(chat, "and goats")
    chat.reset()
    assert chat.memory().tokens_written == 0 and chat.messages == [] and chat.session is None
    assert chat.load("anna").tokens == kept.tokens_written
    assert chat.memory() == kept and chat.messages == []
    remembered = ask(chat, "what do I keep?")
    chat.reset()
    assert ask(chat, "what do I keep?") != remembered, "without the memory the answer is another"


def test_save_goes_on_from_what_was_loaded(chat: Chat) -> None:
    ask(chat, "I keep bees")
    assert [chat.save("anna").generation for _ in range(2)] == [1, 2]
    chat.load("anna")
    assert chat.messages == [], "the text is dropped"
    ask(chat, "and goats")
    assert chat.save("anna").generation == 3
    branch = chat.save("berta")
    assert (branch.generation, branch.tokens) == (1, chat.memory().tokens_written)


def test_another_session_is_not_overwritten_unless_forced(chat: Chat, sessions: Sessions) -> None:
    ask(chat, "I keep bees")
    chat.save("anna")
    chat.reset()
    ask(chat, "hello")
    with pytest.raises(LlamamemError, match="does not go on from it; nothing was saved"):
        chat.save("anna")
    assert sessions.store.load("anna")[0].generation == 1
    assert chat.save("anna", force=True).generation == 2


def test_who_saved_in_between_is_not_overwritten(chat: Chat, sessions: Sessions) -> None:
    ask(chat, "I keep bees")
    chat.save("anna")
    sessions.turn("anna", "meanwhile")
    ask(chat, "and goats")
    with pytest.raises(Conflict, match="generation 2 over 1"):
        chat.save("anna")
    assert chat.save("anna", force=True).generation == 3


def test_a_save_that_fails_leaves_no_session_behind(
    chat: Chat, sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(chat, "I keep bees")

    def full(*_: object) -> None:
        raise LlamamemError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(type(sessions.store), "save", full)
        with pytest.raises(LlamamemError, match="disk full"):
            chat.save("anna")
    assert sessions.store.entries() == [] and chat.session is None


def test_what_was_said_until_an_interrupt_is_remembered_too(chat: Chat, server: FakeServer) -> None:
    answer = chat.ask("hello")
    said = ""
    while not said:
        said += next(answer).text
    answer.close()
    assert chat.save("anna").tokens == 2
    assert server.asked[-1][1]["n_predict"] == 0 and server.asked[-1][1]["prompt"] == f"hello {said}"


def test_a_closed_answer_stays_said_as_far_as_it_came(chat: Chat) -> None:
    answer = chat.ask("hello")
    said = ""
    while not said:
        said += next(answer).text
    answer.close()
    assert chat.messages[-1] == {"role": "assistant", "content": said}


def test_an_answer_that_fails_or_was_closed_unheard_was_not_asked(chat: Chat, server: FakeServer) -> None:
    ask(chat, "hello")
    before = list(chat.messages)
    server.before["completion"] = refuse("exceeds the context")
    with pytest.raises(LlamamemError, match="exceeds the context"):
        ask(chat, "more")
    server.before.clear()
    answer = chat.ask("more")
    next(answer)  # names the role, says nothing
    answer.close()
    assert chat.messages == before


def test_a_server_without_a_memory_can_be_talked_to(sessions: Sessions, server: FakeServer) -> None:
    server.identity = None
    chat = Chat(sessions.client, sessions=sessions, system="be brief")
    ask(chat, "hello")
    assert server.asked[-1][1]["messages"][0] == {"role": "system", "content": "be brief"}
    assert "rwkv_ms" not in server.asked[-1][1], "which such a server would refuse"
    for use in (chat.memory, lambda: chat.save("anna"), lambda: chat.load("anna")):
        with pytest.raises(LlamamemError, match="serves no memory"):
            use()


def test_slots_that_are_not_there_and_options_of_its_own_are_refused(sessions: Sessions) -> None:
    with pytest.raises(LlamamemError, match=r"--slot 4: .* has 4, counted from 0"):
        Chat(sessions.client, slot=4)
    with pytest.raises(LlamamemError, match="sets id_slot itself"):
        Chat(sessions.client, id_slot=0)


# The command. A script is what comes in when standard input is no terminal.


@pytest.fixture
def script(llamamem: Run, server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> Run:
    def run(*lines: str, options: tuple[str, ...] = ()) -> Any:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return llamamem("chat", "--url", server.url, *options)

    return run


def test_a_script_prints_answers_and_nothing_else_to_stdout(script: Run, sessions: Sessions) -> None:
    result = script("hello there", "", "/save anna", "/reset", "hello there", "/quit", "not read")
    first, second, end = result.out.split("\n")
    assert result.status == 0 and end == "" and first == second == Learnt().read(["hello", "there"]).said
    assert "'anna' saved: generation 1, 3 tokens" in result.err and "forgotten" in result.err
    assert ">" not in result.out + result.err


def test_memory_shows_whose_memory_it_is(script: Run) -> None:
    result = script("hello there", "/memory", "/save anna", "/memory", options=("--slot", "2"))
    said, alone, norms, counted, again = result.out.splitlines()
    assert alone == "3 tokens written; on a memory of its own, which was empty"
    assert counted == "3 tokens written; on the memory of session 'anna', generation 1"
    value = Learnt().read(["hello", "there", said]).value
    assert norms == again == f"norm by layer: 3: {float(value):.3g}"


def test_a_session_is_begun_with_and_saved_without_its_name(script: Run, tmp_path: Path) -> None:
    store = ("--store", str(tmp_path / "kept"))
    assert script("I keep bees", "/save anna", options=store).status == 0
    result = script("and goats", "/save", "/save  --force  anna", options=("--session", "anna", *store))
    assert result.status == 0 and "generation 2" in result.err and "generation 3" in result.err
    assert DirectoryStore(tmp_path / "kept").load("anna")[0].tokens == 4 + 3


def test_two_slashes_send_one(script: Run, server: FakeServer) -> None:
    assert script("//etc/hosts is what?").status == 0
    assert server.asked[-1][1]["messages"][-1]["content"] == "/etc/hosts is what?"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/bogus", "line 2: /bogus: not a command; /help names them"),
        ("/", "line 2: /: not a command"),
        ("/reset now", "line 2: /reset now: not a command"),
        ("/save", "line 2: /save: which session?"),
        ("/load", "line 2: /load: which session?"),
        ("/save --force", "line 2: /save: which session?"),
        ("/load nobody", "line 2: session 'nobody': not in "),
    ],
)
def test_a_line_that_fails_ends_the_script_with_its_number(
    script: Run, server: FakeServer, line: str, message: str
) -> None:
    result = script("hello", line, "never sent")
    assert result.status == 2 and f"llamamem: error: {message}" in result.err and "Traceback" not in result.err
    assert [body for _, body in server.asked if "never sent" in str(body)] == []


def test_options_reach_the_request(script: Run, server: FakeServer) -> None:
    script("hello", options=("--temperature", "0.5", "--seed", "7", "--max-tokens", "9", "--system", "be brief"))
    request = server.asked[-1][1]
    assert (request["temperature"], request["seed"], request["max_tokens"]) == (0.5, 7, 9)
    assert request["messages"][0] == {"role": "system", "content": "be brief"}
    script("hello")
    assert not {"temperature", "seed", "max_tokens", "top_k"} & set(server.asked[-1][1]), "the server's own"


def test_a_full_context_is_said(script: Run, server: FakeServer) -> None:
    server.finish_reason = "length"
    assert "the context is full" in script("hello").err
    assert "the context is full" not in script("hello", options=("--max-tokens", "3")).err


def test_an_interrupted_script_exits_130(script: Run, server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Chat, "ask", interrupted)
    result = script("hello")
    assert result.status == 130 and "Traceback" not in result.err


# In a terminal.


class Terminal:
    def __init__(self, *arguments: str) -> None:
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "llamamem.cli", "chat", *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env={**os.environ, "TERM": "dumb"},
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0) and None,  # so that Ctrl-C is a signal to it
        )
        os.close(slave)
        self.seen = ""

    def until(self, text: str, seconds: float = 30) -> str:
        """What came up to and with this text."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < end, f"no {text!r} in {self.seen!r}"
            if select.select([self.master], [], [], 0.05)[0]:
                self.seen += os.read(self.master, 65536).decode()
        before, found, self.seen = self.seen.partition(text)
        return before + found

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def press(self, key: str, text: str) -> None:
        """Until this text comes, as a person does: Python loses a signal that comes just before it waits for a line."""
        for _ in range(10):
            self.type(key)
            with contextlib.suppress(AssertionError):
                self.until(text, 3)
                return
        raise AssertionError(f"no {text!r} in {self.seen!r}")


@pytest.fixture
def terminal(server: FakeServer) -> Iterator[Terminal]:
    terminal = Terminal("--url", server.url)
    try:
        yield terminal
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.master)


def test_in_a_terminal_ctrl_c_interrupts_the_answer_and_ctrl_d_ends(terminal: Terminal, server: FakeServer) -> None:
    begun = terminal.until("> ")
    assert "on a memory of its own, which was empty; /help names the commands, Ctrl-D ends" in begun
    piece, go_on = threading.Event(), threading.Event()

    def hold(number: int) -> None:
        if number == 2:  # the role and a piece of text are out
            piece.set()
            go_on.wait(30)

    server.hold = hold
    terminal.type("hello\n")
    assert piece.wait(30)
    terminal.until("hello\r\n")
    while len(terminal.seen) < 2:  # the first piece is on the screen
        terminal.seen += os.read(terminal.master, 100).decode()
    terminal.type("\x03")
    assert "(interrupted; Ctrl-D ends)" in terminal.until("> ")
    go_on.set()
    server.hold = lambda number: None
    terminal.type("more\n")
    terminal.until("> ")
    contents = [m["content"] for m in server.asked[-1][1]["messages"]]
    assert contents[0] == "hello" and len(contents[1]) == 2 and contents[2] == "more", "what was said stays said"
    terminal.type("/bogus\n")
    assert "llamamem: error: /bogus: not a command" in terminal.until("> "), "a mistake does not end it"
    terminal.press("\x03", "> ")
    terminal.type("\x04")
    assert terminal.process.wait(30) == 0


def test_the_prompt_names_the_session_that_is_talked_on(terminal: Terminal) -> None:
    terminal.until("> ")
    terminal.type("I keep bees\n")
    terminal.until("> ")
    terminal.type("/save anna\n")
    assert "'anna' saved" in terminal.until("anna> ")
    terminal.type("/reset\n")
    assert terminal.until("> ").endswith("\n> ")
    terminal.type("/quit\n")
    assert terminal.process.wait(30) == 0


def test_control_characters_of_a_model_do_not_reach_the_terminal(terminal: Terminal, server: FakeServer) -> None:
    complete = server.complete

    def evil(slot: Slot, body: dict[str, Any], *, own: bool) -> dict[str, Any]:
        return {**complete(slot, body, own=own), "content": "a\x1b[2Jb\nc"}

    server.complete = evil  # type: ignore[method-assign]
    terminal.until("> ")
    terminal.type("hello\n")
    assert "a·[2Jb\r\nc\r\n" in terminal.until("> ")
    terminal.type("/quit\n")
    assert terminal.process.wait(30) == 0
