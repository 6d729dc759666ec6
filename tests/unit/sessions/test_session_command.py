"""`llamamem session` as a user types it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import psutil
import pytest
from fake_memory_server import IDENTITY, FakeServer, Refused, Slot

from llamamem.formats.run import RunRecord, runs_dir, write_run
from llamamem.sessions import DirectoryStore, Memory, SqliteStore

Run = Callable[..., Any]


def data_store(tmp_path: Path) -> DirectoryStore:
    """Where sessions are without --store."""
    return DirectoryStore(tmp_path / "xdg_data_home" / "llamamem" / "sessions")


@pytest.fixture
def running(server: FakeServer) -> RunRecord:
    """The record that `llamamem serve` would have left of the stand-in."""
    record = RunRecord(
        run_id="20260101-000000-aaaaaa",
        state="ready",
        pid=os.getpid(),
        create_time=psutil.Process().create_time(),
        launcher_pid=os.getpid(),
        host="127.0.0.1",
        port=int(server.url.rpartition(":")[2]),
        url=server.url,
        profile="batched",
        model="base.gguf",
        slot_dir=str(server.slot_dir),
        log="log",
        argv=[],
        started=time.time(),
    )
    write_run(record, runs_dir() / f"{record.run_id}.json")
    return record


def one_line(err: str) -> bool:
    return err.startswith("llamamem: error: ") and err.count("\n") == 1 and "Traceback" not in err


@pytest.mark.parametrize("form", ["{}", "sqlite:{}"])
@pytest.mark.parametrize("arguments", [["list"], ["list", "--json"], ["prune", "--older-than", "1d"]])
def test_a_store_that_was_named_and_is_not_there(
    llamamem: Run, tmp_path: Path, arguments: list[str], form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = form.format(tmp_path / "typo")
    result = llamamem("session", *arguments, "--store", place)
    assert result.status == 2 and result.out == "" and one_line(result.err)
    assert f"--store {place}: no such store" in result.err and "session start" in result.err
    assert not (tmp_path / "typo").exists()
    monkeypatch.setenv("LLAMAMEM_SESSIONS", place)
    assert llamamem("session", *arguments).status == 2


def test_no_sessions_yet(llamamem: Run) -> None:
    result = llamamem("session", "list")
    assert (result.status, result.out) == (0, "") and "`llamamem session start NAME` makes one" in result.err
    assert json.loads(llamamem("session", "list", "--json").out)["sessions"] == []


def test_start_resume_save_list_rm(llamamem: Run, server: FakeServer, running: RunRecord, tmp_path: Path) -> None:
    assert llamamem("session", "start", "alice").status == 0
    assert llamamem("session", "resume", "alice", "--slot", "1").status == 0
    server.slots[1].read(["some", "text"])
    saved = llamamem("session", "save", "alice", "--slot", "1")
    assert saved.status == 0 and saved.out == "" and "generation 1, 2 tokens" in saved.err
    assert data_store(tmp_path).load("alice")[0].tokens == 2
    started = llamamem("session", "start", "bob's", "--from", "alice", "--json")
    assert json.loads(started.out)["parent"] == "alice" and started.err == ""
    listed = llamamem("session", "list")
    assert listed.status == 0
    for word in ("alice", "bob's", IDENTITY.sidecar_sha256[:12], "generation"):
        assert word in listed.out
    assert llamamem("session", "rm", "alice", "bob's").status == 0
    assert llamamem("session", "list").out == ""


@pytest.mark.parametrize("kind", ["directory", "sqlite", "environment"])
def test_the_store_may_be_chosen(llamamem: Run, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "chosen"
    option = ["--store", f"{path}" if kind == "directory" else f"sqlite:{path}"]
    if kind == "environment":
        monkeypatch.setenv("LLAMAMEM_SESSIONS", option[1])
        option = []
    assert llamamem("session", "start", "alice", *option).status == 0
    store = DirectoryStore(path) if kind == "directory" else SqliteStore(path)
    assert [entry.label for entry in store.entries()] == ["alice"]
    assert not data_store(tmp_path).path.exists()


def test_a_server_may_be_named_by_its_url(llamamem: Run, server: FakeServer) -> None:
    llamamem("session", "start", "alice")
    line = ["session", "resume", "alice", "--slot", "0", "--url", server.url]
    assert llamamem(*line).status == 0
    assert llamamem(*line, "--slot-dir", server.slot_dir).status == 0, "as it was needed once"
    both = llamamem(*line, "--run", "2026")
    assert both.status == 2 and "--run and --url" in both.err
    missing = llamamem(*line[:-2])
    assert missing.status == 2 and "no server runs" in missing.err


def test_a_url_and_the_name_of_a_run_are_one_server(llamamem: Run, server: FakeServer, running: RunRecord) -> None:
    llamamem("session", "start", "alice")
    assert llamamem("session", "resume", "alice", "--slot", "0", "--url", f"{server.url}/").status == 0
    assert llamamem("session", "save", "alice", "--slot", "0", "--run", "20260101").status == 0


def test_a_conflict_exits_1(llamamem: Run, server: FakeServer, running: RunRecord, tmp_path: Path) -> None:
    llamamem("session", "start", "alice")
    for slot in ("0", "1"):
        llamamem("session", "resume", "alice", "--slot", slot)
        server.slots[int(slot)].read(["text"])
    assert llamamem("session", "save", "alice", "--slot", "0").status == 0
    told = llamamem("session", "save", "alice", "--slot", "1")
    assert told.status == 1 and one_line(told.err) and "another writer" in told.err
    assert llamamem("session", "save", "alice", "--slot", "1", "--force").status == 0
    assert data_store(tmp_path).load("alice")[0].generation == 2


def test_what_the_server_says_is_shown(llamamem: Run, server: FakeServer, running: RunRecord) -> None:
    llamamem("session", "start", "alice")

    def refuse(_: Slot) -> None:
        raise Refused("[state-kv] no room")

    server.before["memory-save"] = refuse
    refused = llamamem("session", "save", "alice", "--slot", "0")
    assert refused.status == 2 and one_line(refused.err) and "answered 400: [state-kv] no room" in refused.err


def test_list_json_is_one_object_with_the_damaged(llamamem: Run, tmp_path: Path, memory: Callable[..., Memory]) -> None:
    store = data_store(tmp_path)
    store.save(store.create("caf\u00e9 [red]"), memory(3, 1))
    whole = llamamem("session", "list", "--json")
    value = json.loads(whole.out)
    assert whole.status == 0 and value["total_bytes"] == len(memory(3, 1).data)
    (listed,) = value["sessions"]
    assert (listed["name"], listed["tokens"], listed["fault"]) == ("caf\u00e9 [red]", 3, None)
    assert listed["used"].endswith("Z")
    next(store.path.rglob("*.state")).write_bytes(b"")
    spoilt = llamamem("session", "list", "--json")
    assert spoilt.status == 1 and "state is damaged" in json.loads(spoilt.out)["sessions"][0]["fault"]
    table = llamamem("session", "list")
    assert table.status == 1 and "caf\u00e9 [red]" in table.out and "state is damaged" in table.out


def test_the_quota_refuses(llamamem: Run, server: FakeServer, running: RunRecord, tmp_path: Path) -> None:
    llamamem("session", "start", "alice")
    refused = llamamem("session", "save", "alice", "--slot", "0", "--quota", "100")
    assert refused.status == 2 and one_line(refused.err) and "quota of 100" in refused.err and "prune" in refused.err
    assert llamamem("session", "save", "alice", "--slot", "0", "--quota", "1k").status == 0
    assert llamamem("session", "start", "bob", "--from", "alice", "--quota", "1k").status == 0
    copied = llamamem("session", "start", "carol", "--from", "alice", "--quota", "1kB")
    assert copied.status == 2 and "quota of 1000" in copied.err
    assert llamamem("session", "start", "carol", "--from", "alice", "--quota", "20M").status == 0
    odd = llamamem("session", "start", "dave", "--quota", "lots")
    assert odd.status == 2 and one_line(odd.err)


def test_prune_prints_what_it_removed(llamamem: Run, tmp_path: Path) -> None:
    store = data_store(tmp_path)
    for name in ("old", "new"):
        store.create(name)
    path = next(store.path.rglob(f"{sha256(b'old').hexdigest()}.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"used": "2025-12-31T00:00:00Z"}))
    assert llamamem("session", "prune", "--older-than", "99999w").out == ""
    pruned = llamamem("session", "prune", "--older-than", "30d")
    assert pruned.status == 0 and pruned.out == "old\n"
    assert json.loads(llamamem("session", "prune", "--older-than", "0m", "--json").out) == {"removed": ["new"]}
    for age in ("30", "month", "-3d", "1000000d"):
        odd = llamamem("session", "prune", "--older-than", age)
        assert odd.status == 2 and one_line(odd.err) and "30d" in odd.err


@pytest.mark.parametrize(
    "line, said",
    [
        (["resume", "nobody", "--slot", "0"], "'nobody'"),
        (["rm", "nobody"], "'nobody'"),
        (["start", "copy", "--from", "nobody"], "'nobody'"),
        (["start", ""], "name"),
        (["start", "two\nlines"], "name"),
        (["resume", "alice", "--slot", "9"], "slot 9"),
    ],
)
def test_errors_are_one_line_with_status_2(
    llamamem: Run, running: RunRecord, tmp_path: Path, line: list[str], said: str
) -> None:
    data_store(tmp_path).create("alice")
    refused = llamamem("session", *line)
    assert refused.status == 2 and one_line(refused.err) and said in refused.err and refused.out == ""


def test_undo_and_history(llamamem: Run, tmp_path: Path, memory: Callable[..., Memory]) -> None:
    store = data_store(tmp_path)
    store.save(store.save(store.create("alice"), memory(1, 1)), memory(2, 2))
    shown = llamamem("session", "history", "alice")
    assert [line.split()[1] for line in shown.out.splitlines()] == ["2", "1"] and "2 tokens" in shown.out
    found = json.loads(llamamem("session", "history", "alice", "--json").out)
    assert [(g["generation"], g["tokens"]) for g in found["generations"]] == [(2, 2), (1, 1)]
    undone = llamamem("session", "undo", "alice")
    assert undone.status == 0 and "generation 3, 1 tokens" in undone.err
    assert store.load("alice")[1] == memory(1, 1).data
    store.create("bob")
    refused = llamamem("session", "undo", "bob")
    assert refused.status == 2 and one_line(refused.err) and "no generation before" in refused.err


def test_the_list_has_pages(llamamem: Run, tmp_path: Path) -> None:
    for i in range(5):
        data_store(tmp_path).create(f"s{i}")
    first = llamamem("session", "list", "--limit", "3")
    assert len(first.out.splitlines()) == 4 and "--limit 3 --after s" in first.err
    last = first.err.split()[-1]
    second = json.loads(llamamem("session", "list", "--limit", "3", "--after", last, "--json").out)
    assert len(second["sessions"]) == 2 and second["next"] is None


def test_verify_reads_every_state(llamamem: Run, tmp_path: Path, memory: Callable[..., Memory]) -> None:
    store = data_store(tmp_path)
    store.save(store.create("alice"), memory(1, 1))
    path = next(store.path.rglob("*.state"))
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    assert llamamem("session", "list").status == 0
    found = llamamem("session", "list", "--verify")
    assert found.status == 1 and "do not have the hash" in found.out


def test_rm_empties_the_slot_unless_it_is_kept(llamamem: Run, server: FakeServer, running: RunRecord) -> None:
    for keep in ((), ("--keep-slot",)):
        llamamem("session", "start", "alice")
        llamamem("session", "resume", "alice", "--slot", "1")
        server.slots[1].read(["some", "text"])
        assert llamamem("session", "rm", "alice", *keep).status == 0
        assert server.slots[1].tokens == (2 if keep else 0)
    assert llamamem("session", "save", "alice", "--slot", "1").status == 2, "nor is it brought back"


def test_a_save_that_does_not_continue_is_one_line_with_status_2(
    llamamem: Run, server: FakeServer, running: RunRecord, tmp_path: Path
) -> None:
    llamamem("session", "start", "solo")
    llamamem("session", "resume", "solo", "--slot", "0")
    server.slots[0].read(["the", "first", "chat"])
    assert llamamem("session", "save", "solo", "--slot", "0").status == 0
    server.slots[0].text = ["a", "new", "chat", "of", "more", "words"]
    refused = llamamem("session", "save", "solo", "--slot", "0")
    assert refused.status == 2 and one_line(refused.err) and "--force" in refused.err
    assert "does not begin with those 3 tokens" in refused.err
    assert data_store(tmp_path).load("solo")[0].generation == 1
