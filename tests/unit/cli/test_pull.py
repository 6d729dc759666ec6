"""`llamamem pull` with a small catalogue, a small wheel, and a stub in the place of pip; and the names it gives."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import make_cli_docs
import pytest

from llamamem.cli.base import base_file, base_name
from llamamem.native import catalogue, pull
from llamamem.native.catalogue import CATALOGUE, Entry, base_path

Run = Callable[..., Any]
GGUF = b"GGUF" + bytes(range(256)) * 9000

# what pip 23 prints, shortened
BROKEN = (
    "WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError': /simple/tiny/\n"
    "ERROR: Could not find a version that satisfies the requirement tiny==1 (from versions: none)"
)
ABSENT = "ERROR: Could not find a version that satisfies the requirement tiny==1 (from versions: 2)"
HASHES = (
    "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE. If you have updated\n"
    "    tiny==1 from somewhere:\n        Expected sha256 00\n             Got        ab12\n"
)
FULL = "ERROR: Exception:\nTraceback (most recent call last):\nOSError: [Errno 28] No space left on device"

STUB = """
import os, shutil, sys, time
args = sys.argv[1:]
with open({calls!r}, "a") as calls:
    print(*args, file=calls)
if os.path.exists({said!r}):
    sys.stdout.write(open({said!r}).read())
    sys.exit(1)
place = args[args.index("--dest") + 1]
os.makedirs(place)
assert os.path.dirname(place) == os.environ["TMPDIR"]
while os.path.exists({slow!r}):
    open(place + "/half.part", "ab").write(b"x")
    time.sleep(0.01)
shutil.copy({wheel!r}, place)
"""


class Pip:
    """The stub: `said` makes it fail with that text, `slow` makes it last; `calls` are its command lines."""

    def __init__(self, folder: Path, wheel: Path) -> None:
        self.said, self.slow, self._calls = folder / "said", folder / "slow", folder / "calls"
        script = folder / "pip.py"
        names = {"said": self.said, "slow": self.slow, "calls": self._calls, "wheel": wheel}
        script.write_text(STUB.format(**{name: str(path) for name, path in names.items()}))
        self.command = [sys.executable, str(script)]

    @property
    def calls(self) -> list[str]:
        return self._calls.read_text().splitlines() if self._calls.exists() else []


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "tiny-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tiny/Tiny.Q4_1.gguf", GGUF)
        archive.writestr("tiny-1.dist-info/METADATA", "Name: tiny\n")
    return path


@pytest.fixture
def entry(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Entry:
    monkeypatch.setenv("LLAMAMEM_CACHE_DIR", str(tmp_path / "cache"))
    data = wheel.read_bytes()
    found = Entry(
        name="tiny",
        title="Tiny, Q4_1",
        requirement="tiny==1",
        wheel_sha256=hashlib.sha256(data).hexdigest(),
        wheel_size=len(data),
        member="tiny/Tiny.Q4_1.gguf",
        sha256=hashlib.sha256(GGUF).hexdigest(),
        size=len(GGUF),
        license="Apache-2.0",
    )
    monkeypatch.setitem(CATALOGUE, "tiny", found)
    return found


@pytest.fixture
def pip(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pip:
    stub = Pip(tmp_path, wheel)
    monkeypatch.setattr(pull, "_PIP", stub.command)
    return stub


def models(entry: Entry) -> list[str]:
    return sorted(path.name for path in entry.path.parent.iterdir() if path.name != ".lock")


def test_it_is_fetched_once(entry: Entry, pip: Pip, llamamem: Run) -> None:
    listed = json.loads(llamamem("pull", "--json").out)["models"]
    assert [each["here"] for each in listed if each["name"] == "tiny"] == [False]
    first = llamamem("pull", "tiny")
    assert first.status == 0 and first.out == f"{entry.path}\n", first.err
    assert "fetched" in first.err and "Apache-2.0" in first.err and "serve --model tiny" in first.err
    assert entry.path.read_bytes() == GGUF and models(entry) == [entry.path.name]
    (call,) = pip.calls
    assert "--no-deps" in call and "--require-hashes" in call and "://" not in call and "index" not in call
    again = llamamem("pull", "tiny", "--json")
    assert again.status == 0 and json.loads(again.out)["models"][0]["fetched"] is False and len(pip.calls) == 1
    assert "is here already" in llamamem("pull", "tiny").err
    (row,) = (line for line in llamamem("pull").out.splitlines() if line.startswith("tiny "))
    assert str(entry.path) in row and "Apache-2.0" in row


def test_what_is_not_whole_is_never_taken_for_whole(entry: Entry, pip: Pip, llamamem: Run) -> None:
    entry.path.parent.mkdir(parents=True)
    entry.path.write_bytes(GGUF[:-1])
    refused = llamamem("serve", "--model", "tiny", "--dry-run")
    assert refused.status == 2 and "`llamamem pull tiny`" in refused.err
    assert "fetching it again" in llamamem("pull", "tiny").err and entry.path.read_bytes() == GGUF
    entry.path.write_bytes(GGUF[:-1] + b"?")  # of its size, and another
    assert llamamem("pull", "tiny").status == 0 and entry.path.read_bytes() == GGUF and len(pip.calls) == 2


@pytest.mark.parametrize("whole", [True, False])
def test_a_wheel_that_a_dead_pull_left(entry: Entry, pip: Pip, wheel: Path, llamamem: Run, whole: bool) -> None:
    work = entry.path.parent / ".pull-tiny"
    (work / "files").mkdir(parents=True)
    (work / "whole.whl").write_bytes(wheel.read_bytes() if whole else wheel.read_bytes()[:-9])
    (work / "part.gguf").write_bytes(GGUF[:100])
    assert llamamem("pull", "tiny").status == 0 and models(entry) == [entry.path.name]
    assert entry.path.read_bytes() == GGUF and len(pip.calls) == (0 if whole else 1)


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (BROKEN, "cannot fetch tiny==1: its index cannot be reached; check the network"),
        (ABSENT, "(from versions: 2); check pip's index settings"),
        (HASHES, "tiny==1: its SHA-256 is ab12, the catalogue wants"),
        (FULL, "no room is left; a pull needs"),
        ("/usr/bin/python3: No module named pip", "-m ensurepip` gives it one"),
        ("", "pip said nothing"),
    ],
)
def test_what_pip_cannot_do_is_one_line(entry: Entry, pip: Pip, llamamem: Run, said: str, shown: str) -> None:
    pip.said.write_text(said)
    result = llamamem("pull", "tiny")
    assert result.status == 2 and result.out == "" and not entry.path.exists()
    line = result.err.splitlines()[-1]
    assert line.startswith("llamamem: error: ") and shown in line
    pip.said.unlink()
    assert llamamem("pull", "tiny").status == 0


def test_a_wheel_or_a_gguf_with_another_hash(
    entry: Entry, pip: Pip, wheel: Path, llamamem: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for field in ("wheel_sha256", "sha256"):
        other = Entry(**{**vars(entry), field: "0" * 64})
        monkeypatch.setitem(CATALOGUE, "tiny", other)
        result = llamamem("pull", "tiny")
        assert result.status == 2 and "the catalogue wants 000" in result.err
        assert not [name for name in models(entry) if name.endswith(".gguf")]


def test_no_room_and_no_right_to_write(
    entry: Entry, pip: Pip, llamamem: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pull.os, "fsync", full)
        result = llamamem("pull", "tiny")
    assert result.status == 2 and "no room is left" in result.err and not entry.path.exists()
    assert llamamem("pull", "tiny").status == 0 and len(pip.calls) == 1  # the wheel was whole
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLAMAMEM_CACHE_DIR", str(tmp_path / "file"))
    result = llamamem("pull", "tiny")
    assert result.status == 2 and "the cache cannot be written" in result.err and "LLAMAMEM_CACHE_DIR" in result.err


def test_a_name_that_is_not_there(llamamem: Run) -> None:
    result = llamamem("pull", "smollm3")
    assert result.status == 2 and result.err.count("\n") == 1 and "smollm2" in result.err


PULL = """
import sys
from llamamem.native import pull
from llamamem.native.catalogue import Entry
pull._PIP = {command!r}
print(pull.pull(Entry(**{entry!r})), flush=True)
"""


def test_two_at_once_and_one_that_is_killed(entry: Entry, pip: Pip) -> None:
    pip.slow.touch()
    script = PULL.format(command=pip.command, entry=vars(entry))
    command = [sys.executable, "-c", script]
    killed = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    wait_for(lambda: len(pip.calls) == 1)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert not entry.path.exists()
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: len(pip.calls) == 2)
    second = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert second.stderr is not None and "waiting for it" in second.stderr.readline()
    pip.slow.unlink()
    assert first.communicate(timeout=60)[0] == "True\n" and second.communicate(timeout=60)[0] == "False\n"
    assert entry.path.read_bytes() == GGUF and models(entry) == [entry.path.name] and len(pip.calls) == 2


def wait_for(ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# -- names in place of files


def test_every_option_of_a_base_takes_a_name() -> None:
    taken = {
        f"{path} {parameter.name}": getattr(info, "callback", None)
        for path, callback, _ in make_cli_docs.commands()
        for parameter, _, info in make_cli_docs.parameters(callback)
        if parameter.name in ("model", "base", "to_base")
    }
    assert len(taken) >= 15 and set(taken.values()) == {base_file, base_name}, taken


def test_a_name_is_the_pulled_file(
    entry: Entry, pip: Pip, llamamem: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments in (["serve", "--model", "tiny"], ["sidecar", "validate", "s.gguf", "--base", "tiny"]):
        result = llamamem(*arguments)
        assert result.status == 2 and result.out == "" and result.err.count("\n") == 1
        assert "`llamamem pull tiny`" in result.err
    assert llamamem("pull", "tiny").status == 0
    assert base_path(Path("tiny")) == entry.path and base_path(Path("a/tiny")) == Path("a/tiny")
    (tmp_path / "tiny").mkdir()  # what `--output tiny` leaves is no base
    assert base_path(Path("tiny")) == entry.path
    (tmp_path / "tiny" / "config.json").write_text("{}")
    assert base_path(Path("tiny")) == Path("tiny")


def test_the_catalogue_says_all_that_is_needed() -> None:
    for name, entry in catalogue.CATALOGUE.items():
        assert name == entry.name and "==" in entry.requirement and entry.license and entry.member.endswith(".gguf")
        assert len(entry.wheel_sha256) == len(entry.sha256) == 64 and entry.size > 0 < entry.wheel_size
        assert entry.sidecar is None
