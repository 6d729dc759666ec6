"""Completion as a shell has it: what Tab offers after the installed script was read."""

from __future__ import annotations

import functools
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from llamamem.formats.run import RunRecord, runs_dir, write_run
from llamamem.sessions import DirectoryStore

BASH = shutil.which("bash")
pytestmark = pytest.mark.skipif(BASH is None, reason="no bash here")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user of bash with `llamamem` on the path, and nothing yet."""
    binary = tmp_path / "bin" / "llamamem"
    binary.parent.mkdir()
    binary.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m llamamem.cli "$@"\n')
    binary.chmod(0o755)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", f"{binary.parent}:{os.environ['PATH']}")
    for name in ("XDG_STATE_HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.delenv("LLAMAMEM_SESSIONS", raising=False)
    return tmp_path


def bash(script: str) -> str:
    return subprocess.run([str(BASH), "--norc", "-c", script], capture_output=True, text=True, check=True).stdout


@functools.cache
def source() -> str:
    return bash("_LLAMAMEM_COMPLETE=source_bash llamamem")


def offered(*words: str) -> set[str]:
    """What a Tab after the last word gives."""
    complete = 'COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _llamamem_completion "$1"; printf "%s\\n" "${COMPREPLY[@]}"'
    return set(bash(f"{source()}\nset -- {shlex.join(words)}; {complete}").split("\n")) - {""}


def test_verbs_and_options(home: Path) -> None:
    assert {"serve", "session"} <= offered("llamamem", "se")
    assert offered("llamamem", "sidecar", "ins") == {"inspect"}
    assert offered("llamamem", "serve", "--side") == {"--sidecar"}
    assert offered("llamamem", "serve", "--profile", "b") == {"batched", "base"}


def test_names_of_runs_and_sessions(home: Path) -> None:
    assert offered("llamamem", "chat", "--run", "") == offered("llamamem", "chat", "--session", "") == set()
    now = psutil.Process()
    record = RunRecord(
        run_id="20260101-000000-aaaaaa",
        name="mine",
        state="ready",
        pid=now.pid,
        create_time=now.create_time(),
        launcher_pid=now.pid,
        host="127.0.0.1",
        port=1,
        url="http://127.0.0.1:1",
        profile="serial",
        model="base.gguf",
        log="log",
        argv=[],
        started=time.time(),
    )
    write_run(record, runs_dir() / f"{record.run_id}.json")
    DirectoryStore(home / "xdg_data_home" / "llamamem" / "sessions").create("anna")
    DirectoryStore(home / "other").create("berta")
    assert offered("llamamem", "chat", "--run", "m") == {"mine"}
    assert offered("llamamem", "chat", "--session", "") == offered("llamamem", "session", "rm", "") == {"anna"}
    assert offered("llamamem", "session", "resume", "--store", str(home / "other"), "") == {"berta"}


def test_it_installs_itself(home: Path) -> None:
    bash("llamamem --install-completion; :")
    script = bash("cat ~/.bashrc ~/.bash_completions/*")
    assert "_llamamem_completion" in script and str(home) in script
