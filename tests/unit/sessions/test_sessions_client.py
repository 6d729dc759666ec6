"""Sessions in the slots of a server: a stand-in over HTTP."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_memory_server import IDENTITY, FakeServer, Learnt, Slot, make_memory, make_state, refuse, talk, wait_for

from llamamem.errors import LlamamemError
from llamamem.formats.run import state_dir
from llamamem.formats.state import Identity, encode_state
from llamamem.serving.client import Client
from llamamem.serving.slots import held
from llamamem.sessions import Conflict, DirectoryStore, Memory, Sessions, SessionStore, resumed

MakeMemory = Callable[..., Memory]


def test_a_session_goes_on_where_it_was_saved(sessions: Sessions, server: FakeServer) -> None:
    sessions.start("alice")
    sessions.resume("alice", 0)
    first = talk(sessions, 0, "my name is Alice")
    saved = sessions.save("alice", 0)
    assert (saved.generation, saved.tokens) == (1, 5)
    assert (saved.sidecar_sha256, saved.base_sha256) == tuple(IDENTITY)
    talk(sessions, 0, "something else")
    sessions.resume("alice", 2)
    assert server.slots[2].tokens == 5
    assert talk(sessions, 2, "again") == Learnt().read(["my", "name", "is", "Alice", first, "again"]).said


def test_no_directory_is_shared_with_the_server(sessions: Sessions, server: FakeServer) -> None:
    sessions.start("alice")
    sessions.resume("alice", 0)
    talk(sessions, 0, "hello")
    sessions.save("alice", 0)
    assert all("filename" not in body for _, body in server.asked) and server.slot_dir is not None
    assert list(server.slot_dir.iterdir()) == []


def test_a_new_session_begins_on_an_empty_memory_in_a_slot_of_its_own(sessions: Sessions, server: FakeServer) -> None:
    server.slots[1].read(["what", "another", "said"])
    sessions.start("alice")
    sessions.resume("alice", 1)
    assert (server.slots[1].text, server.slots[1].tokens) == ([], 0)
    assert server.slots[1].given, "who names no slot does not get it"


@pytest.mark.parametrize(
    "other", [IDENTITY._replace(sidecar_sha256="99" * 32), IDENTITY._replace(base_sha256="99" * 32)]
)
def test_a_session_of_another_model_is_not_sent(sessions: Sessions, server: FakeServer, other: Identity) -> None:
    sessions.start("alice")
    sessions.turn("alice", "hello")
    server.asked.clear()
    server.identity = other
    for use in (lambda: sessions.resume("alice", 0), lambda: sessions.turn("alice", "more")):
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
    server.bytes_of = lambda memory: other  # type: ignore[method-assign]
    with pytest.raises(LlamamemError, match="state-identity"):
        sessions.save("alice", 0, force=True)
    assert sessions.store.load("alice")[1] is None


@pytest.mark.parametrize("slot", [4, 7, -1])
def test_a_slot_that_is_not_there_is_refused(sessions: Sessions, server: FakeServer, slot: int) -> None:
    sessions.start("alice")
    for use in (sessions.resume, sessions.save):
        with pytest.raises(LlamamemError, match=rf"slot {slot}.*has 4"):
            use("alice", slot)
    assert server.asked == []


def test_a_server_without_a_memory_is_refused(sessions: Sessions, server: FakeServer) -> None:
    sessions.start("alice")
    server.identity = None
    for use in (lambda: sessions.turn("alice", "hello"), lambda: sessions.resume("alice", 0)):
        with pytest.raises(LlamamemError, match=r"serves no memory.*--sidecar"):
            use()
    assert server.asked == []


def test_a_server_of_an_older_build_is_refused_with_what_to_do(sessions: Sessions, server: FakeServer) -> None:
    sessions.start("alice")
    server.features = []
    with pytest.raises(LlamamemError, match=r"no memory in a request.*llamamem build"):
        sessions.turn("alice", "hello")
    assert server.asked == []


def test_a_server_that_is_none_of_ours_is_refused(sessions: Sessions, server: FakeServer) -> None:
    sessions.start("alice")
    server.props = lambda: {"total_slots": 4, "rwkv_ms": {"sidecar_sha256": "no"}}  # type: ignore[method-assign]
    with pytest.raises(LlamamemError, match=r"/props.*sidecar_sha256"):
        sessions.resume("alice", 0)


def test_a_restore_that_did_not_happen_is_noticed(sessions: Sessions, server: FakeServer) -> None:
    sessions.start("alice")
    sessions.turn("alice", "hello")
    server.restore = lambda slot, body: {"tokens_written": slot.tokens + 1}  # type: ignore[method-assign]
    with pytest.raises(LlamamemError, match=r"has 2 tokens.*came back with 1"):
        sessions.resume("alice", 0)


def test_a_save_goes_on_from_the_version_that_was_resumed(sessions: Sessions, server: FakeServer) -> None:
    sessions.start("alice")
    sessions.resume("alice", 0)
    talk(sessions, 0, "one")
    sessions.turn("alice", "meanwhile")
    with pytest.raises(Conflict, match="generation 1 over 0"):
        sessions.save("alice", 0)
    saved = sessions.save("alice", 0, force=True)
    assert (saved.generation, saved.tokens) == (2, 2)
    server.slots[0].read(["two"])
    assert sessions.save("alice", 0).generation == 3, "a save is where the next one goes on from"


def test_another_process_knows_what_was_resumed(sessions: Sessions, server: FakeServer) -> None:
    sessions.start("alice")
    sessions.turn("alice", "hello")
    sessions.resume("alice", 0)
    server.slots[0].read(["more"])
    with Client(server.url) as client:
        other = Sessions(client, sessions.store)
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


def test_a_first_save_takes_nobody_elses_memory(sessions: Sessions, server: FakeServer) -> None:
    """Somebody gave this slot a memory in another way."""
    server.slots[0].origin, server.slots[0].given = Learnt(7, 7), True
    sessions.start("alice")
    with pytest.raises(LlamamemError, match=r"began on memory .*nothing was saved.*--force"):
        sessions.save("alice", 0)
    assert sessions.store.load("alice")[1] is None


# What does not continue is refused, by name of what is wrong.


def test_a_new_chat_after_a_save_does_not_replace_what_the_first_one_told(
    sessions: Sessions, server: FakeServer
) -> None:
    sessions.start("solo")
    sessions.resume("solo", 0)
    talk(sessions, 0, "this is anna baker")
    first = sessions.save("solo", 0)
    talk(sessions, 0, "a new chat in the same client, and a longer one")
    with pytest.raises(
        LlamamemError, match=r"'solo'.*does not begin with those 5 tokens.*nothing was saved.*--force"
    ) as told:
        sessions.save("solo", 0)
    assert (told.value.exit_status, told.value.reason) == (2, "state-continues")
    assert sessions.store.load("solo")[0].generation == first.generation
    assert sessions.save("solo", 0, force=True).generation == 2
    assert sessions.store.undo("solo").state_sha256 == first.state_sha256, "and what was forced can be taken back"


def test_a_text_that_goes_on_after_a_save_is_saved_again(sessions: Sessions, server: FakeServer) -> None:
    sessions.start("solo")
    sessions.resume("solo", 0)
    said = talk(sessions, 0, "this is anna baker")
    sessions.save("solo", 0)
    talk(sessions, 0, f"this is anna baker {said} and more")
    assert sessions.save("solo", 0).tokens == 8


@pytest.mark.parametrize("disturb", ["erase", "memory-reset"])
def test_a_slot_that_was_reset_and_talked_to_at_length_is_not_saved(
    sessions: Sessions, server: FakeServer, disturb: str
) -> None:
    sessions.start("alice")
    sessions.turn("alice", "hello")
    sessions.resume("alice", 0)
    (sessions.client.erase_slot if disturb == "erase" else sessions.client.reset_memory)(0)
    talk(sessions, 0, "more tokens than were ever resumed, of somebody else")
    with pytest.raises(LlamamemError, match=r"nothing was saved") as told:
        sessions.save("alice", 0)
    assert told.value.reason == "state-continues"
    assert sessions.store.load("alice")[0].tokens == 2


def test_a_slot_that_was_given_another_memory_is_not_saved(sessions: Sessions, server: FakeServer) -> None:
    sessions.start("alice")
    sessions.turn("alice", "hello")
    sessions.resume("alice", 0)
    sessions.client.give_memory(0, make_memory(90, 4).data)
    with pytest.raises(LlamamemError, match=r"began on memory .*nothing was saved"):
        sessions.save("alice", 0)


@pytest.mark.parametrize("begun", [True, False], ids=["with a memory", "with none yet"])
@pytest.mark.parametrize("known", [True, False], ids=["that says which run it is", "that does not"])
def test_a_stranger_on_a_server_that_was_started_again_on_the_same_port_is_not_saved(
    store: SessionStore, begun: bool, known: bool
) -> None:
    with FakeServer(run="one" if known else None) as first, Client(first.url) as client:
        sessions = Sessions(client, store)
        sessions.start("anna")
        if begun:
            sessions.turn("anna", "I keep bees")
        before = store.load("anna")[1]
        sessions.resume("anna", 0)
        port = int(first.url.rpartition(":")[2])
    with FakeServer(port=port, run="two" if known else None) as second, Client(second.url) as client:
        sessions = Sessions(client, store)
        talk(sessions, 0, "a stranger talks at length about other things")
        if known and not begun:
            second.slots[0].given = True  # another user's session, empty too, was resumed there
        with pytest.raises(LlamamemError, match=r"nothing was saved"):
            sessions.save("anna", 0)
    assert store.load("anna")[1] == before


def test_what_an_earlier_run_of_the_server_held_is_not_saved(sessions: Sessions, server: FakeServer) -> None:
    sessions.start("alice")
    sessions.turn("alice", "hello")
    before = Sessions(sessions.client, sessions.store, run_id="one")
    before.resume("alice", 0)
    after = Sessions(sessions.client, sessions.store, run_id="two")
    with pytest.raises(LlamamemError, match="the server started again"):
        after.save("alice", 0)
    assert before.save("alice", 0).generation == 2


def test_a_server_that_slept_is_not_taken_for_the_one_that_was_resumed_on(
    sessions: Sessions, server: FakeServer
) -> None:
    """It comes back with empty slots, on the same port, in the same process."""
    sessions.start("alice")
    sessions.resume("alice", 0)
    server.slots[0] = Slot()
    talk(sessions, 0, "who woke it up")
    with pytest.raises(LlamamemError, match=r"was reset since.*or the server started again.*nothing was saved"):
        sessions.save("alice", 0)


def test_a_request_that_names_no_slot_neither_sees_nor_changes_what_was_resumed(
    sessions: Sessions, server: FakeServer
) -> None:
    fresh = sessions.client.completion("who is anna?")["content"]
    sessions.start("anna")
    sessions.turn("anna", "this is anna baker.")
    for slot in range(3):
        sessions.resume("anna", slot)
    assert {sessions.client.completion("who is anna?")["content"] for _ in range(20)} == {fresh}
    assert sessions.save("anna", 0).tokens == 5


# Notes of what was resumed.


def note() -> Path:
    (path,) = (state_dir() / "resumed").glob("*.json")
    return path


def test_a_note_is_for_its_owner_alone(sessions: Sessions, server: FakeServer) -> None:
    sessions.start("alice")
    sessions.resume("alice", 0)
    assert note().stat().st_mode & 0o077 == 0 and note().parent.stat().st_mode & 0o077 == 0


def test_a_damaged_note_is_no_note(sessions: Sessions, server: FakeServer) -> None:
    sessions.start("alice")
    sessions.turn("alice", "hello")
    sessions.resume("alice", 0)
    os.truncate(note(), 30)
    with pytest.raises(LlamamemError, match="holds no session"):
        sessions.save("alice", 0)


def test_a_removed_session_is_not_brought_back_by_a_save(sessions: Sessions, server: FakeServer) -> None:
    sessions.start("alice")
    sessions.resume("alice", 0)
    sessions.store.remove("alice")
    with pytest.raises(LlamamemError, match=r"'alice'.*not in"):
        sessions.save("alice", 0)
    assert sessions.store.entries() == []


def test_a_refused_resume_is_no_resume(sessions: Sessions, server: FakeServer) -> None:
    sessions.start("alice")
    sessions.turn("alice", "hello")
    sessions.resume("alice", 0)
    server.before["memory-restore"] = refuse("no")
    with pytest.raises(LlamamemError, match="answered 400: no"):
        sessions.resume("alice", 0)
    with pytest.raises(LlamamemError, match="holds no session"):
        sessions.save("alice", 0)


def test_a_slot_that_another_process_is_at_is_waited_for_and_given_up(sessions: Sessions, server: FakeServer) -> None:
    sessions.start("alice")
    sessions.wait = 0.1
    with held(server.url, 0, 1):
        with pytest.raises(LlamamemError, match="slot 0: another process"):
            sessions.resume("alice", 0)
        sessions.resume("alice", 1)


def test_a_busy_slot_is_given_up_in_bounded_time(sessions: Sessions, server: FakeServer) -> None:
    sessions.start("alice")
    release = threading.Event()
    server.before["memory-restore"] = lambda _: release.wait(10)
    with Client(server.url, timeout=0.2) as hurried, pytest.raises(LlamamemError, match="ReadTimeout"):
        Sessions(hurried, sessions.store).resume("alice", 0)
    release.set()
    wait_for(lambda: not server.slots[0].lock.locked())
    assert server.asked[-1][1]["timeout"] == 0.2, "the server gives it up too"
    with Client(server.url) as patient:
        patient.reset_memory(1)
    assert server.asked[-1][1]["timeout"] == 60


# Forgotten means gone.


def test_rm_empties_the_slot_that_still_holds_the_memory(sessions: Sessions, server: FakeServer) -> None:
    sessions.start("alice")
    sessions.turn("alice", "hello")
    sessions.resume("alice", 2)
    talk(sessions, 2, "more")
    sessions.store.remove("alice")
    assert resumed.release(sessions.store.location, "alice") == []
    assert server.slots[2].memory == Learnt() and not server.slots[2].given
    assert list((state_dir() / "resumed").glob("*.json")) == []


def test_rm_leaves_a_slot_that_was_given_to_another_since(sessions: Sessions, server: FakeServer) -> None:
    sessions.start("alice")
    sessions.turn("alice", "hello")
    sessions.resume("alice", 2)
    sessions.client.give_memory(2, make_memory(9, 9).data)
    assert resumed.release(sessions.store.location, "alice") == []
    assert server.slots[2].tokens == 9


def test_rm_keeps_the_slot_when_told_and_says_when_it_cannot_ask(sessions: Sessions, server: FakeServer) -> None:
    sessions.start("alice")
    sessions.turn("alice", "hello")
    sessions.resume("alice", 2)
    assert resumed.release(sessions.store.location, "alice", keep_slot=True) == [] and server.slots[2].tokens == 2
    sessions.resume("alice", 2)
    server.__exit__()
    (left,) = resumed.release(sessions.store.location, "alice")
    assert f"slot 2 of {server.url} may still hold the memory of 'alice'" in left


def test_what_killed_processes_left_is_swept(tmp_path: Path) -> None:
    slots = state_dir() / "slots" / "demo"
    slots.mkdir(parents=True)
    gone = 2**22 + 1  # no pid
    left = [
        "llamamem-0123456789abcdef.state",
        ".llamamem-8080-slot-0.json",
        ".llamamem-8080-slot-0.lock",
        f"llamamem-health-{gone}-0123456789ab-kept.state",
        f"llamamem-{gone}-01234567.state",
        f"anna.bin.{gone}.part",
    ]
    aside = f"llamamem-health-{gone}-fedcba987654-kept.state"
    (state_dir() / "resumed").mkdir()
    (state_dir() / "resumed" / "00.health").write_text(json.dumps({"file": aside}))
    kept = [aside, "anna.bin", "notes.part", f"llamamem-{os.getpid()}-01234567.state", f"anna.bin.{os.getpid()}.part"]
    for name in [*left, *kept, "llamamem-fedcba9876543210.state"]:
        (slots / name).write_bytes(b"")
    for name in [*left, *kept]:
        os.utime(slots / name, (0, 0))
    resumed.sweep()
    assert sorted(path.name for path in slots.iterdir()) == sorted([*kept, "llamamem-fedcba9876543210.state"])


def test_notes_of_servers_that_are_gone_are_swept(sessions: Sessions, server: FakeServer) -> None:
    sessions.start("alice")
    Sessions(sessions.client, sessions.store, run_id="20260101-000000-aaaaaa").resume("alice", 0)
    sessions.resume("alice", 1)
    resumed.sweep()
    assert resumed.noted(server.url, 0) is None and resumed.noted(server.url, 1) is not None


def test_a_store_that_cannot_be_written_can_be_resumed_from(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = DirectoryStore(tmp_path / "full")
    with Client(server.url) as client:
        sessions = Sessions(client, store)
        sessions.start("alice")
        sessions.turn("alice", "hello")

        def full(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("llamamem.sessions.directory.replace_private", full)
        assert sessions.resume("alice", 0).tokens == 2
        with pytest.raises(LlamamemError, match="No space left"):
            sessions.turn("alice", "more")
