"""What stands where a file should: refused in one line at once, by every reader and by the commands around them."""

from __future__ import annotations

import os
import signal
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from state_files import MEMORY, SEQUENCE, u32

from llamamem.errors import LlamamemError
from llamamem.formats.base import file_sha256, read_base
from llamamem.formats.checkpoint import read_checkpoint
from llamamem.formats.gguf_file import read_gguf_index, replacing
from llamamem.formats.sidecar import read_sidecar, validate_sidecar
from llamamem.formats.state import MEMORY as KIND_MEMORY
from llamamem.formats.state import read_state, write_state
from llamamem.formats.state.block import is_memory_file
from llamamem.sessions import DirectoryStore

SECONDS, MIB = 30, 64
READERS: dict[str, Callable[[Path], object]] = {
    "state": read_state,
    "gguf": read_gguf_index,
    "base": read_base,
    "sidecar": read_sidecar,
    "hash": file_sha256,
}


@pytest.fixture(autouse=True)
def _in_no_time() -> Iterator[None]:
    """What waits for a pipe or reads without end fails here, and not when the machine does."""

    def late(*_: object) -> None:
        raise AssertionError(f"not answered within {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(params=["pipe", "device", "directory"])
def no_file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "it"
    {
        "pipe": lambda: os.mkfifo(path),
        "device": lambda: path.symlink_to("/dev/zero"),
        "directory": path.mkdir,
    }[request.param]()
    return path


@pytest.fixture
def sparse(tmp_path: Path) -> Iterator[Callable[[bytes, bytes], Path]]:
    """A file of 2 GiB that begins and ends with these bytes; what is done with it takes no memory for the rest."""

    def make(begin: bytes, end: bytes) -> Path:
        path = tmp_path / "sparse"
        with path.open("wb") as file:
            file.write(begin)
            file.truncate((2 << 30) - len(end))
            file.seek(0, os.SEEK_END)
            file.write(end)
        return path

    tracemalloc.start()
    yield make
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MIB << 20


@pytest.mark.parametrize("name", READERS)
def test_readers(name: str, no_file: Path) -> None:
    with pytest.raises(LlamamemError) as refused:
        READERS[name](no_file)
    assert str(no_file) in str(refused.value) and "\n" not in str(refused.value)


def test_a_state_is_unreadable(no_file: Path) -> None:
    with pytest.raises(LlamamemError, match=r"\[state-unreadable\] is not a file"):
        read_state(no_file)
    assert not is_memory_file(no_file)


def test_a_sidecar_is_unreadable(no_file: Path) -> None:
    assert [finding.reason for finding in validate_sidecar(no_file).findings] == ["unreadable"]


def test_a_checkpoint_in_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "adapter.pt")
    with pytest.raises(LlamamemError):
        read_checkpoint(tmp_path)


TRAILER = b"RMVE" + struct.pack("<IQ", 1, (2 << 30) - 48) + bytes(32)


def filled(state: object, at: int) -> bytes:
    """The head of a file whose header says that the KV cache takes the rest of 2 GiB."""
    data = bytearray(state.bytes()[: at + 320])  # type: ignore[attr-defined]
    cells = len(state.block()) - 320  # type: ignore[attr-defined]
    data[at + 48 : at + 56] = struct.pack("<Q", (2 << 30) - 48 - 320 - at - cells)
    return bytes(data)


@pytest.mark.parametrize(
    ("begin", "end", "reason"),
    [
        (b"", b"", "state-format"),
        (b"", TRAILER, "state-format"),
        (MEMORY.prefix, b"", "state-no-memory"),
        (MEMORY.prefix, TRAILER, "state-no-memory"),
        (MEMORY.bytes()[:332], b"", "state-truncated"),
        (MEMORY.bytes()[:332], TRAILER, "state-truncated"),
        (b"qsgg" + u32(3, 500_000_000), TRAILER, "state-no-memory"),
        (filled(MEMORY, 12), TRAILER, "state-shape"),
        (filled(replace(MEMORY, header={12: u32(3)}), 12), TRAILER, "state-kind"),
        (filled(SEQUENCE, 24), TRAILER, "state-kind"),
    ],
)
def test_a_state_of_2_gib(sparse: Callable[..., Path], begin: bytes, end: bytes, reason: str) -> None:
    with pytest.raises(LlamamemError) as refused:
        read_state(sparse(begin, end), kinds=(KIND_MEMORY,))
    assert refused.value.reason == reason


def test_a_sidecar_of_2_gib(sparse: Callable[..., Path]) -> None:
    path = sparse(b"GGUF", b"")
    assert [finding.reason for finding in validate_sidecar(path).findings] == ["too-large"]
    with pytest.raises(LlamamemError, match="GGUF version 0"):
        read_gguf_index(path)


# -- what is written


def test_a_memory_is_its_owners_alone(tmp_path: Path) -> None:
    state = read_state(_put(tmp_path / "x.state", MEMORY.bytes()))
    write_state(tmp_path / "y.state", state)
    assert (tmp_path / "y.state").stat().st_mode & 0o777 == 0o600


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    victim = _put(tmp_path / "victim", b"old")
    (tmp_path / f".x.{os.getpid()}.part").symlink_to(victim)
    with replacing(tmp_path / "x") as part:
        part.write_bytes(b"new")
    assert (victim.read_bytes(), (tmp_path / "x").read_bytes()) == (b"old", b"new")
    assert not (tmp_path / "x").is_symlink()


# -- the commands


def test_sidecar_validate(no_file: Path, llamamem) -> None:
    result = llamamem("sidecar", "validate", no_file)
    assert result.status == 2 and f"{no_file}: [unreadable] cannot be read" in result.out


def test_session_list(tmp_path: Path, llamamem) -> None:
    """Where somebody else can write into the store: the session is listed as damaged, the others as they are."""
    store = DirectoryStore(tmp_path / "store")
    for name in ("anna", "kate"):
        store.create(name)
    path = next((tmp_path / "store").rglob("*.json"))
    path.unlink()
    os.mkfifo(path)
    result = llamamem("session", "list", "--store", store.path)
    assert "not a regular file" in result.out + result.err
    assert ("anna" in result.out) != ("kate" in result.out)


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_session_list_on_what_is_no_directory(kind: str, tmp_path: Path, llamamem) -> None:
    path = tmp_path / "store"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    for store in (path, f"sqlite:{path}"):
        result = llamamem("session", "list", "--store", store)
        assert result.status != 0 and str(path) in result.err


def _put(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path
