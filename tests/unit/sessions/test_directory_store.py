"""The directory of sessions: crashes at every step of a change, full disks, damaged files."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import filelock
import pytest

from llamamem.errors import LlamamemError
from llamamem.formats import private
from llamamem.sessions import DirectoryStore, Memory, directory, layout
from llamamem.sessions.session import Conversation
from llamamem.sessions.store import Unreachable

MakeMemory = Callable[..., Memory]


class Killed(BaseException):
    """The process ends here."""


@pytest.fixture
def place(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "store")


def files(place: DirectoryStore) -> list[str]:
    """What lies in the store, without its locks."""
    places = [path for path in place.path.rglob("*") if path.is_file() and path.parent.name != "locks"]
    return sorted(path.name for path in places if path.name != "removals")


def folder(place: DirectoryStore, name: str = "alice") -> Path:
    """That has the files of this session."""
    return next((place.path / "sessions").iterdir()) / key(name)[:2]


def key(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


@contextmanager
def stopped_at(step: int, when: str, stop: BaseException) -> Iterator[list[str]]:
    """`stop` is raised before or after the given one of all calls that change the disk; yields their names."""
    calls: list[str] = []

    def wrap(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if name == "open" and not args[1] & os.O_CREAT:  # of the directory, to flush it
                return real(*args, **kwargs)
            mine = len(calls) == step
            calls.append(name)
            if mine and when == "before":
                raise stop
            result = real(*args, **kwargs)
            if mine:
                raise stop
            return result

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(private, "os", _Os({n: wrap(n, getattr(os, n)) for n in ("open", "replace", "fsync")}))
        patch.setattr(Path, "unlink", wrap("unlink", Path.unlink))
        patch.setattr(directory, "os", _Os({"unlink": wrap("unlink", unlink)}))
        yield calls


def unlink(path: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)


class _Os:
    """The module, as one other alone sees it, with some functions replaced."""

    def __init__(self, replaced: dict[str, Any]) -> None:
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


SAVE_STEPS = ["open", "fsync", "replace"] * 2 + ["fsync"] + ["unlink"] * 2


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", range(len(SAVE_STEPS)))
def test_a_crash_in_a_save_leaves_a_whole_session(
    place: DirectoryStore, memory: MakeMemory, step: int, when: str
) -> None:
    saved = place.save(place.create("alice"), memory(1, 1))
    with pytest.raises(Killed), stopped_at(step, when, Killed()) as calls:
        place.save(saved, memory(2, 2))
    assert calls == SAVE_STEPS[: step + 1]
    commit = SAVE_STEPS.index("replace", 3)
    committed = step > commit or (step == commit and when == "after")
    loaded, state = place.load("alice")
    assert (loaded.generation, state) == ((2, memory(2, 2).data) if committed else (1, memory(1, 1).data))
    assert [entry.fault for entry in place.entries(verify=True)] == [None]
    last = place.save(loaded, memory(3, 3))
    assert place.load("alice")[1] == memory(3, 3).data
    kept = [f"{key('alice')}-{last.generation - i}.state" for i in (1, 0)]
    assert files(place) == [*kept, f"{key('alice')}.json"], "the rest is swept"


def test_the_steps_of_a_save_are_all_of_them(place: DirectoryStore, memory: MakeMemory) -> None:
    saved = place.save(place.create("alice"), memory(1, 1))
    with stopped_at(-1, "before", Killed()) as calls:
        place.save(saved, memory(2, 2))
    assert calls == SAVE_STEPS


def test_what_a_conversation_began_on_is_written_once(
    place: DirectoryStore, memory: MakeMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The origin of a turn is in a file already, but on a disk without links."""
    turn = {"conversation": Conversation(), "origin": memory(1, 1).data}
    first = place.save(place.create("alice"), memory(1, 1))
    second = place.save(first, memory(2, 2), **turn)
    with monkeypatch.context() as patch:
        patch.setattr(directory.os, "link", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.EPERM, "no links")))
        third = place.save(second, memory(3, 3), **turn)
    place.save(third, memory(4, 4), **turn)
    inodes = {name.name.partition("-")[2]: name.stat().st_ino for name in folder(place).glob("*-*")}
    assert inodes["3.origin"] == inodes["4.origin"] != inodes["3.state"] and len(inodes) == 4
    assert place.read("alice")[1:] == (memory(4, 4).data, memory(1, 1).data)
    assert place.undo("alice").tokens == 3 and place.read("alice")[1:] == (memory(3, 3).data, memory(1, 1).data)
    place.remove("alice")
    assert files(place) == []


@pytest.mark.parametrize("step", range(SAVE_STEPS.index("unlink")))
def test_a_full_disk_in_a_save_is_one_line_and_leaves_the_old_session(
    place: DirectoryStore, memory: MakeMemory, step: int
) -> None:
    saved = place.save(place.create("alice"), memory(1, 1))
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(LlamamemError, match="No space left on device"), stopped_at(step, "before", full):
        place.save(saved, memory(2, 2))
    assert not [name for name in files(place) if name.endswith(".part")]
    loaded, state = place.load("alice")
    assert state == memory(loaded.generation, loaded.generation).data


def test_a_file_that_cannot_be_removed_is_one_line(place: DirectoryStore, memory: MakeMemory) -> None:
    place.save(place.create("alice"), memory(1, 1))
    denied = OSError(errno.EACCES, "Permission denied")
    for use in (lambda: place.remove("alice"), lambda: place.prune(timedelta(days=-1))):
        with pytest.raises(LlamamemError, match="Permission denied"), stopped_at(0, "before", denied):
            use()
    assert place.load("alice")[1] == memory(1, 1).data


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", range(8))
def test_a_crash_in_a_copy_leaves_all_or_nothing_or_what_is_reported(
    place: DirectoryStore, memory: MakeMemory, step: int, when: str
) -> None:
    place.save(place.create("prefix"), memory(1, 1))
    copies = 4  # writes before: `used` of the prefix
    with pytest.raises(Killed), stopped_at(copies + step, when, Killed()):
        place.create("alice", from_="prefix")
    assert place.load("prefix")[1] == memory(1, 1).data
    entries = {entry.label: entry for entry in place.entries()}
    assert entries.pop("prefix").fault is None
    if "alice" in entries:
        assert place.load("alice")[1] == memory(1, 1).data
        return
    for entry in entries.values():  # the state is there, its metadata not yet
        assert entry.session is None and "half-written" in str(entry.fault) and key("alice") in entry.label
        for use in (place.load, place.create):
            with pytest.raises(LlamamemError, match=r"'alice'.*half-written.*llamamem session rm"):
                use("alice")
        place.remove("alice")
    place.create("alice", from_="prefix")
    assert place.load("alice")[1] == memory(1, 1).data
    assert len(place.entries()) == 2


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", range(3))
def test_a_crash_in_a_removal_leaves_a_session_that_is_whole_or_refused(
    place: DirectoryStore, memory: MakeMemory, step: int, when: str
) -> None:
    place.save(place.create("alice"), memory(1, 1))
    with pytest.raises(Killed), stopped_at(step, when, Killed()):
        place.remove("alice")
    for entry in place.entries():
        if entry.fault is None:
            assert place.load("alice")[1] == memory(1, 1).data
        else:
            with pytest.raises(LlamamemError, match=r"half-removed.*llamamem session rm"):
                place.load("alice")
        place.remove("alice")
    assert files(place) == []


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", range(4))
def test_a_crash_in_a_load_changes_nothing(place: DirectoryStore, memory: MakeMemory, step: int, when: str) -> None:
    saved = place.save(place.create("alice"), memory(1, 1))
    with pytest.raises(Killed), stopped_at(step, when, Killed()):
        place.load("alice")
    assert place.load("alice")[1] == memory(1, 1).data
    place.save(saved, memory(2, 2))
    assert len(files(place)) == 3


def state_file(place: DirectoryStore) -> Path:
    return next(folder(place).glob(f"{key('alice')}-*.state"))


def metadata_file(place: DirectoryStore) -> Path:
    return folder(place) / f"{key('alice')}.json"


def edit(place: DirectoryStore, **members: Any) -> None:
    value = json.loads(metadata_file(place).read_text())
    metadata_file(place).write_text(json.dumps(value | members))


DAMAGES: dict[str, tuple[Callable[[DirectoryStore], Any], str]] = {
    "a flipped byte": (lambda p: state_file(p).write_bytes(b"\1" + state_file(p).read_bytes()[1:]), "hash"),
    "a cut state": (lambda p: os.truncate(state_file(p), 100), "hash"),
    "a longer state": (lambda p: state_file(p).write_bytes(state_file(p).read_bytes() + b"\0"), "hash"),
    "no state": (lambda p: state_file(p).unlink(), "state is missing"),
    "an older state": (lambda p: edit(p, generation=4), "state is missing"),
    "a directory for a state": (lambda p: (state_file(p).unlink(), state_file_named(p).mkdir()), "cannot be read"),
    "a pipe for a state": (lambda p: (state_file(p).unlink(), os.mkfifo(state_file_named(p))), "cannot be read"),
    "a pipe for metadata": (lambda p: (metadata_file(p).unlink(), os.mkfifo(metadata_file(p))), "cannot be read"),
    "no metadata": (lambda p: metadata_file(p).unlink(), "metadata is missing"),
    "empty metadata": (lambda p: metadata_file(p).write_bytes(b""), "metadata is damaged"),
    "cut metadata": (lambda p: os.truncate(metadata_file(p), 80), "metadata is damaged"),
    "metadata of bytes": (lambda p: metadata_file(p).write_bytes(b"\xff\xfe\0"), "metadata is damaged"),
    "deep metadata": (lambda p: metadata_file(p).write_text("[" * 100_000), "metadata is damaged"),
    "a later format": (lambda p: edit(p, format="llamamem_session.v2"), "format"),
    "an odd member": (lambda p: edit(p, colour="red"), "colour"),
    "a hash that is none": (lambda p: edit(p, sidecar_sha256="x"), "sidecar_sha256"),
    "another's name": (lambda p: edit(p, name="mallory"), "'mallory'"),
    "a name that is none": (lambda p: edit(p, name="a\nb"), "metadata is damaged"),
    "a time without a zone": (lambda p: edit(p, used="2026-01-01T00:00:00"), "used"),
}


def state_file_named(place: DirectoryStore) -> Path:
    return folder(place) / f"{key('alice')}-1.state"


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_listed_and_refused(place: DirectoryStore, memory: MakeMemory, damage: str) -> None:
    saved = place.save(place.create("alice"), memory(1, 1))
    place.save(place.create("bob"), memory(2, 2))
    spoil, said = DAMAGES[damage]
    spoil(place)
    before = sorted(files(place))
    for use in (
        lambda: place.load("alice"),
        lambda: place.save(saved, memory(3, 3)),
        lambda: place.create("carol", from_="alice"),
        *([] if damage == "no metadata" else [lambda: place.create("alice")]),  # nothing has the name then
    ):
        with pytest.raises(LlamamemError, match="'alice'") as refused:
            use()
        assert said in str(refused.value) and "llamamem session rm" in str(refused.value)
    assert place.prune(timedelta(days=-1)) == ["bob"], "what is damaged is not pruned"
    assert [name for name in before if key("bob") not in name] == files(place)
    (entry,) = place.entries(verify=True)
    assert said in str(entry.fault) and ("alice" == entry.label or key("alice") in entry.label)
    if damage != "a directory for a state":
        place.remove("alice")
        assert place.entries() == []


def test_files_that_are_not_a_sessions_are_left_alone(place: DirectoryStore, memory: MakeMemory) -> None:
    saved = place.save(place.create("alice"), memory(1, 1))
    others = ["notes.json", "old.state", f"{key('bob')}.json.bak", f"{key('bob')}-x.state"]
    for name in others:
        (place.path / name).write_text("mine")
    assert [entry.label for entry in place.entries()] == ["alice"]
    assert place.total_bytes() == len(memory(1).data)
    place.save(saved, memory(2, 2))
    place.remove("alice")
    assert files(place) == sorted(others)


def test_only_the_owner_can_read(place: DirectoryStore, memory: MakeMemory) -> None:
    place.save(place.create("alice"), memory(1, 1))
    for path in (place.path, state_file(place), metadata_file(place)):
        assert path.stat().st_mode & 0o077 == 0


def test_a_place_that_is_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("")
    place = DirectoryStore(path)
    for use in (place.entries, place.total_bytes, lambda: place.create("alice"), lambda: place.load("alice")):
        with pytest.raises(LlamamemError, match=f"{path}"):
            use()


def test_a_lock_that_is_held_is_waited_for(place: DirectoryStore, memory: MakeMemory) -> None:
    saved = place.create("alice")
    done: list[int] = []
    with filelock.FileLock(place.path / "locks" / f"{key('alice')[:2]}.lock"):
        thread = threading.Thread(target=lambda: done.append(place.save(saved, memory(1, 1)).generation))
        thread.start()
        thread.join(0.2)
        assert done == [] and thread.is_alive()
    thread.join(10)
    assert done == [1]


def test_a_lock_that_is_held_on_and_on_is_an_error(
    place: DirectoryStore, memory: MakeMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = place.create("alice")
    monkeypatch.setattr(directory, "_LOCK_TIMEOUT", 0.1)
    with filelock.FileLock(place.path / "locks" / f"{key('alice')[:2]}.lock"):
        with pytest.raises(LlamamemError, match=r"\.lock: held by another process"):
            place.save(saved, memory(1, 1))
        assert place.path.exists()
    assert place.load("alice")[1] is None


def test_a_quota_is_counted_by_one_writer_at_a_time(
    place: DirectoryStore, memory: MakeMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten sessions that fit one by one, saved at once into room for five: five are saved."""
    size = len(memory(1).data)
    limited = DirectoryStore(place.path, quota=5 * size)
    made = [limited.create(f"s{i}") for i in range(10)]
    outcomes: list[str] = []

    def save(i: int) -> None:
        try:
            limited.save(made[i], memory(1, i))
            outcomes.append("saved")
        except LlamamemError:
            outcomes.append("refused")

    threads = [threading.Thread(target=save, args=(i,)) for i in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(outcomes) == ["refused"] * 5 + ["saved"] * 5
    assert limited.total_bytes() == 5 * size


def test_a_link_that_somebody_laid_is_not_written_through(
    place: DirectoryStore, memory: MakeMemory, tmp_path: Path
) -> None:
    saved = place.save(place.create("alice"), memory(1, 1))
    target = tmp_path / "theirs"
    target.write_text("theirs")
    for name in (f".{key('alice')}.json.part", f".{key('alice')}-2.state.part"):
        (folder(place) / name).symlink_to(target)
    place.save(saved, memory(2, 2))
    assert target.read_text() == "theirs" and place.load("alice")[1] == memory(2, 2).data
    assert not [name for name in files(place) if name.endswith(".part")]


@pytest.mark.parametrize("why", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_what_is_there_can_be_read_where_nothing_can_be_written(
    place: DirectoryStore, memory: MakeMemory, why: int
) -> None:
    saved = place.save(place.create("alice"), memory(1, 1))
    with stopped_at(0, "before", OSError(why, os.strerror(why))):
        loaded, state = place.load("alice")
    assert state == memory(1, 1).data and loaded.used == saved.used


def test_one_that_goes_away_is_not_begun_anew(place: DirectoryStore, memory: MakeMemory) -> None:
    """A disk that is taken off, and one whose empty place stays."""
    place.save(place.create("alice"), memory(1))
    away = place.path.with_name("away")
    place.path.rename(away)
    calls: list[Callable[[], Any]] = [
        lambda: place.lease("alice", "a", 1.0),
        lambda: place.lease("bob", "a", 1.0),
        lambda: place.read("alice"),
        lambda: place.create("bob"),
        lambda: place.remove("alice"),
        place.removals,
        place.entries,
    ]
    for stays in (False, True):
        if stays:
            place.path.mkdir()
        for call in calls:
            with pytest.raises(Unreachable, match="see to the disk"):
                call()
        assert not place.path.exists() or list(place.path.iterdir()) == []
    place.path.rmdir()
    away.rename(place.path)
    assert place.read("alice").state == memory(1).data


def test_a_read_only_store_lists_and_loads(
    place: DirectoryStore, memory: MakeMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may write anywhere: the locks are what a read-only disk refuses first."""
    place.save(place.create("alice"), memory(1, 1))

    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(filelock.FileLock, "acquire", refused)
    assert [entry.fault for entry in place.entries(verify=True)] == [None]
    assert place.load("alice")[1] == memory(1, 1).data and place.names("a", 9) == ["alice"]
    with pytest.raises(LlamamemError, match="Read-only file system"):
        place.remove("alice")


def test_rm_sweeps_what_killed_writers_left(place: DirectoryStore, memory: MakeMemory) -> None:
    place.save(place.create("alice"), memory(1, 1))
    place.save(place.create("bob"), memory(1, 1))
    beside = key("alice")[:2] + "0" * 62  # would lie in the same folder
    parts = [folder(place) / f".{k}-2.state.part" for k in (key("alice"), beside)]
    parts.append(folder(place, "bob") / f".{key('bob')}-2.state.part")
    for part in parts:
        part.write_bytes(b"half a memory")
        os.utime(part, (0, 0))
    (folder(place) / f"{key('alice')}-7.state").write_bytes(b"a generation that nobody knows of")
    place.remove("alice")
    assert files(place) == sorted([f"{key('bob')}-1.state", f"{key('bob')}.json", parts[2].name])
    assert place.prune(timedelta(days=1)) == [] and parts[2].name not in files(place)


OLD = "alice", "bob", "a/b"


@pytest.mark.parametrize("stop", [None, *range(8)])
def test_a_directory_of_an_older_version_is_moved(place: DirectoryStore, memory: MakeMemory, stop: int | None) -> None:
    """Also by two attempts of which the first was killed."""
    for i, name in enumerate(OLD):
        place.save(place.save(place.create(name), memory(i, i)), memory(i + 10, i))
    for path in [path for path in (place.path / "sessions").rglob("*") if path.is_file()]:
        path.rename(place.path / path.name)
    shutil.rmtree(place.path / "sessions")
    if stop is not None:
        moves = iter(range(99))

        def replace(*paths: Any) -> None:
            if next(moves) == stop:
                raise Killed
            os.replace(*paths)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            patch.setattr(layout, "os", _Os({"replace": replace}))
            place.entries()
    assert [(entry.label, entry.fault) for entry in place.entries(verify=True)] == [(n, None) for n in sorted(OLD)]
    for i, name in enumerate(OLD):
        assert place.load(name)[1] == memory(i + 10, i).data and place.undo(name).tokens == i
    assert [path.name for path in place.path.iterdir() if path.is_file()] == []


def test_a_generation_before_that_is_damaged_is_not_brought_back(place: DirectoryStore, memory: MakeMemory) -> None:
    place.save(place.save(place.create("alice"), memory(1, 1)), memory(2, 2))
    (folder(place) / f"{key('alice')}-1.state").write_bytes(b"")
    with pytest.raises(LlamamemError, match=r"generation 1 cannot be brought back: its state is damaged.*2 stays"):
        place.undo("alice")
    assert place.load("alice")[0].generation == 2


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", range(10))
def test_a_crash_in_an_undo_leaves_a_whole_session(
    place: DirectoryStore, memory: MakeMemory, step: int, when: str
) -> None:
    place.save(place.save(place.create("alice"), memory(1, 1)), memory(2, 2))
    with pytest.raises(Killed), stopped_at(step, when, Killed()):
        place.undo("alice")
    loaded, state = place.load("alice")
    assert (loaded.generation, state) in ((2, memory(2, 2).data), (3, memory(1, 1).data))
    assert [entry.fault for entry in place.entries(verify=True)] == [None]
    assert place.undo("alice").tokens in (1, 2)


def test_a_place_for_many_keeps_its_mode(tmp_path: Path) -> None:
    place = tmp_path / "shared"
    place.mkdir()
    place.chmod(0o1777)
    DirectoryStore(place).create("alice")
    assert place.stat().st_mode & 0o7777 == 0o1777
