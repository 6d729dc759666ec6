"""Sessions in the slots of a server: a stand-in over HTTP."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
from fake_memory_server import IDENTITY, FakeServer, Slot, make_state, refuse, talk

from llamamem.errors import LlamamemError
from llamamem.formats.state import Identity, encode_state
from llamamem.serving.client import Client
from llamamem.sessions import Conflict, Memory, Sessions

MakeMemory = Callable[..., Memory]


def test_a_session_goes_on_where_it_was_saved(sessions: Sessions, server: FakeServer) -> None:
    sessions.start("alice")
    sessions.resume("alice", 0)
    first = talk(sessions, 0, "my name is Alice")
    saved = sessions.save("alice", 0)
    assert (saved.generation, saved.tokens) == (1, 5)
    assert (saved.sidecar_sha256, saved.base_sha256) == tuple(IDENTITY)
    talk(sessions, 0, "something else")
    server.slots[0].text = ["old", "text"]
    sessions.resume("alice", 2)
    assert server.slots[2].tokens == 5 and f"{server.slots[2].value:06x}" != first
    alone = Slot()
    alone.read(["my", "name", "is", "Alice", first, "again"])
    assert talk(sessions, 2, "again") == f"{alone.value:06x}"
    assert server.left == []


def test_a_new_session_begins_with_an_empty_slot(sessions: Sessions, server: FakeServer) -> None:
    server.slots[1].read(["what", "another", "said"])
    sessions.start("alice")
    sessions.resume("alice", 1)
    assert (server.slots[1].text, server.slots[1].tokens) == ([], 0)
    assert server.actions == ["erase"]


def test_the_file_that_is_sent_is_a_plain_name_of_the_session_alone(sessions: Sessions, server: FakeServer) -> None:
    sessions.start("../../evil name")
    sessions.turn("../../evil name", "hello", 0)
    seen: list[int] = []
    server.before["memory-restore"] = lambda _: seen.extend(
        (server.slot_dir / name).stat().st_mode & 0o777 for name in server.left
    )
    sessions.turn("../../evil name", "hello", 0)
    assert seen == [0o600]
    names = [body["filename"] for action, body in server.asked if action.startswith("memory-")]
    assert len(names) == 3 == len(set(names))
    for name in names:
        assert name.startswith("llamamem-") and name.replace("-", "").replace(".", "").isalnum()


def test_a_refused_resume_leaves_no_file(sessions: Sessions, server: FakeServer) -> None:
    sessions.start("alice")
    sessions.turn("alice", "hello", 0)
    server.before["memory-restore"] = refuse("no")
    with pytest.raises(LlamamemError, match="answered 400: no"):
        sessions.resume("alice", 0)
    assert server.left == []


@pytest.mark.parametrize(
    "other", [IDENTITY._replace(sidecar_sha256="99" * 32), IDENTITY._replace(base_sha256="99" * 32)]
)
def test_a_session_of_another_model_is_not_sent(sessions: Sessions, server: FakeServer, other: Identity) -> None:
    sessions.start("alice")
    sessions.turn("alice", "hello", 0)
    server.asked.clear()
    server.identity = other
    for use in (lambda: sessions.resume("alice", 0), lambda: sessions.turn("alice", "more", 0)):
        with pytest.raises(LlamamemError, match=r"'alice'.*state-identity") as refused:
            use()
        assert refused.value.reason == "state-identity"
        for digest in (*IDENTITY, *other):
            assert digest in str(refused.value)
    assert server.asked == []


def test_a_memory_of_another_model_is_not_saved(sessions: Sessions, server: FakeServer) -> None:
    sessions.start("alice")
    sessions.resume("alice", 0)
    other = encode_state(make_state(3, 3, Identity("99" * 32, "ba" * 32)))
    server.save = lambda slot, body: (server.slot_dir / body["filename"]).write_bytes(other) and {}  # type: ignore
    with pytest.raises(LlamamemError, match="state-identity"):
        sessions.save("alice", 0)
    assert sessions.store.load("alice")[1] is None and server.left == []


def test_a_directory_that_is_not_the_servers_is_said(sessions: Sessions, server: FakeServer, tmp_path: Any) -> None:
    elsewhere = tmp_path / "elsewhere"
    wrong = Sessions(sessions.client, sessions.store, elsewhere)
    wrong.start("alice")
    with pytest.raises(LlamamemError, match=r"elsewhere: no such directory.*--slot-dir"):
        wrong.turn("alice", "hello", 0)
    assert not elsewhere.exists()
    elsewhere.mkdir()
    with pytest.raises(LlamamemError, match=r"is not its --slot-save-path"):
        wrong.turn("alice", "hello", 0)
    sessions.turn("alice", "hello", 0)
    with pytest.raises(LlamamemError, match=r"answered 400.*state-unreadable"):
        wrong.resume("alice", 0)
    assert [path for path in elsewhere.iterdir() if path.suffix == ".state"] == []


@pytest.mark.parametrize("slot", [4, 7, -1])
def test_a_slot_that_is_not_there_is_refused(sessions: Sessions, server: FakeServer, slot: int) -> None:
    """The server itself would take slot 4 of 4 for slot 0, in which another session may be."""
    sessions.start("alice")
    for use in (sessions.resume, sessions.save):
        with pytest.raises(LlamamemError, match=rf"slot {slot}.*has 4"):
            use("alice", slot)
    with pytest.raises(LlamamemError, match=rf"slot {slot}.*has 4"):
        sessions.turn("alice", "hello", slot)
    assert server.asked == []


def test_a_server_without_a_memory_is_refused(sessions: Sessions, server: FakeServer) -> None:
    sessions.start("alice")
    server.identity = None
    with pytest.raises(LlamamemError, match=r"serves no memory.*--sidecar"):
        sessions.turn("alice", "hello", 0)
    assert server.asked == []


def test_a_server_that_is_none_of_ours_is_refused(sessions: Sessions, server: FakeServer) -> None:
    sessions.start("alice")
    server.props = lambda: {"total_slots": 4, "rwkv_ms": {"sidecar_sha256": "no"}}  # type: ignore[method-assign]
    with pytest.raises(LlamamemError, match=r"/props.*sidecar_sha256"):
        sessions.resume("alice", 0)


def test_a_restore_that_did_not_happen_is_noticed(sessions: Sessions, server: FakeServer) -> None:
    sessions.start("alice")
    sessions.turn("alice", "hello", 0)
    server.restore = lambda slot, body: {"tokens_written": slot.tokens + 1}  # type: ignore[method-assign]
    with pytest.raises(LlamamemError, match=r"has 2 tokens.*came back with 3"):
        sessions.resume("alice", 0)


def test_a_save_goes_on_from_the_version_that_was_resumed(sessions: Sessions, server: FakeServer) -> None:
    sessions.start("alice")
    sessions.resume("alice", 0)
    talk(sessions, 0, "one")
    sessions.turn("alice", "meanwhile", 1)
    with pytest.raises(Conflict, match="generation 1 over 0"):
        sessions.save("alice", 0)
    saved = sessions.save("alice", 0, force=True)
    assert (saved.generation, saved.tokens) == (2, 2)
    server.slots[0].read(["two"])
    assert sessions.save("alice", 0).generation == 3, "a save is where the next one goes on from"


def test_another_process_knows_what_was_resumed(sessions: Sessions, server: FakeServer) -> None:
    sessions.start("alice")
    sessions.turn("alice", "hello", 0)
    sessions.resume("alice", 0)
    server.slots[0].read(["more"])
    with Client(server.url) as client:
        other = Sessions(client, sessions.store, server.slot_dir)
        assert other.save("alice", 0).generation == 2
        for name, slot, said in (("alice", 1, "slot 1 holds no session"), ("bob", 0, "slot 0 holds session 'alice'")):
            if name == "bob":
                other.start("bob")
            with pytest.raises(LlamamemError, match=rf"{said}.*nothing was saved.*--force"):
                other.save(name, slot)
    assert sessions.store.load("bob")[1] is None


def test_a_first_save_needs_no_resume(sessions: Sessions, server: FakeServer) -> None:
    talk(sessions, 0, "hello there")
    sessions.start("alice")
    assert sessions.save("alice", 0).tokens == 3


def test_a_slot_that_was_reset_since_is_not_saved(sessions: Sessions, server: FakeServer) -> None:
    sessions.start("alice")
    sessions.turn("alice", "a longer text than that", 0)
    sessions.resume("alice", 0)
    talk(sessions, 0, "hi")
    talk(sessions, 0, "hi")  # the server dropped the text, and with it the memory
    with pytest.raises(LlamamemError, match=r"remembers 2 tokens, 6 were resumed.*nothing was saved"):
        sessions.save("alice", 0)
    assert sessions.store.load("alice")[0].tokens == 6
    assert sessions.save("alice", 0, force=True).tokens == 2


def test_what_an_earlier_run_of_the_server_held_is_not_saved(sessions: Sessions, server: FakeServer) -> None:
    sessions.start("alice")
    sessions.turn("alice", "hello", 0)
    before = Sessions(sessions.client, sessions.store, server.slot_dir, run_id="one")
    before.resume("alice", 0)
    after = Sessions(sessions.client, sessions.store, server.slot_dir, run_id="two")
    talk(sessions, 0, "a long text in a fresh server")
    with pytest.raises(LlamamemError, match="holds no session"):
        after.save("alice", 0)
    assert before.save("alice", 0).generation == 2


def test_a_damaged_note_is_no_note(sessions: Sessions, server: FakeServer) -> None:
    sessions.start("alice")
    sessions.turn("alice", "hello", 0)
    sessions.resume("alice", 0)
    (note,) = server.slot_dir.glob(".llamamem-*-slot-0.json")
    assert note.stat().st_mode & 0o077 == 0
    os.truncate(note, 30)
    with pytest.raises(LlamamemError, match="holds no session"):
        sessions.save("alice", 0)


def test_a_removed_session_is_not_brought_back_by_a_save(sessions: Sessions, server: FakeServer) -> None:
    sessions.start("alice")
    sessions.resume("alice", 0)
    sessions.store.remove("alice")
    with pytest.raises(LlamamemError, match=r"'alice'.*not in"):
        sessions.save("alice", 0)
    assert sessions.store.entries() == []
