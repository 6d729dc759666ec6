"""Full disks, closed streams, other encodings, Ctrl-C, no home: one line, an exit status, never a traceback."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from llamamem.cli import surroundings

LLAMAMEM = [sys.executable, "-m", "llamamem.cli"]


def run(*args: str, shell: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """`shell` is what a shell does with the streams, as in `>&-`."""
    env = {**os.environ, "LC_ALL": "C.UTF-8", **variables}
    command = ["sh", "-c", f'exec "$@" {shell}', "sh", *LLAMAMEM, *args]
    done = subprocess.run(command, env=env, capture_output=True, text=True, errors="surrogateescape", timeout=120)
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr, done.stderr
    return done


@pytest.mark.parametrize("arguments", [["--version"], ["serve", "--help"], ["ps", "--json"]])
def test_a_full_disk_on_stdout(arguments: list[str], tmp_path: Path) -> None:
    done = run(*arguments, shell="> /dev/full", XDG_STATE_HOME=str(tmp_path))
    assert done.returncode == 2
    assert done.stderr == "llamamem: error: the output cannot be written: no room is left\n"


@pytest.mark.parametrize("streams", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
def test_closed_streams(streams: str, tmp_path: Path) -> None:
    assert run("ps", shell=streams, XDG_STATE_HOME=str(tmp_path)).returncode == 0
    assert run("ps", "--no-such", shell=streams, XDG_STATE_HOME=str(tmp_path)).returncode == 2


def test_the_current_directory_is_gone(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    for arguments, status in (("serve --model base.gguf", 2), ("ps", 0)):
        gone.mkdir()
        script = f'cd {gone} && rmdir {gone} && exec "$@"'
        command = ["sh", "-c", script, "sh", *LLAMAMEM, *arguments.split()]
        env = {**os.environ, "XDG_STATE_HOME": str(tmp_path)}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == status and done.stderr.count("\n") == 1, done.stderr
        if status:
            assert "the directory that this runs in is gone" in done.stderr


def test_nobody_reads_on(tmp_path: Path) -> None:
    done = subprocess.run(f"{' '.join(LLAMAMEM)} --help | true", shell=True, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["serv"], "No such command 'serv'"),
        (["build", "--jobs", "0"], "'--jobs'"),
        (["serve", "--no-such"], "`llamamem serve --help` says what there is"),
        (["smoke"], "--model"),
    ],
)
def test_a_wrong_command_line_is_one_line(arguments: list[str], said: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("llamamem: error: ") and done.stderr.count("\n") == 1 and said in done.stderr


def test_an_api_key_that_no_header_carries() -> None:
    done = run("health", "--url", "http://127.0.0.1:9", "--api-key", "schlüssel")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "printable ASCII" in done.stderr


def test_a_url_that_is_none() -> None:
    done = run("health", "--url", "127.0.0.1:9")
    assert done.returncode == 2 and "http://127.0.0.1:8080" in done.stderr


@pytest.mark.parametrize("name", ["größe.gguf", "模型.gguf", b"\xff\xfe.gguf"])
def test_a_name_that_the_encoding_lacks(name: str | bytes, tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(name)
    for variables in (
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ):
        done = run("sidecar", "inspect", str(path), **variables)
        assert done.returncode == 2 and done.stderr.count("\n") == 1


def test_ctrl_c_while_python_imports() -> None:
    """At the worst moment: in the middle of the longest import."""
    code = """
import os, signal, sys
class Now:
    def find_spec(self, name, path=None, target=None):
        if name == "typer":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Now())
from llamamem.cli import main
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")
    code = "import llamamem.cli, signal; assert signal.getsignal(signal.SIGINT) is signal.default_int_handler"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


@pytest.mark.parametrize("home", [None, "/"])
def test_a_user_without_a_home_gets_a_private_directory(
    home: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(surroundings.os.path, "expanduser", lambda path: home or "~")
    monkeypatch.setattr(surroundings.os, "access", lambda *args: False)
    monkeypatch.setattr(surroundings.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setenv("HOME", "before")
    surroundings._find_home()
    own = Path(os.environ["HOME"])
    assert own == tmp_path / f"llamamem-{os.getuid()}" and stat.S_IMODE(own.stat().st_mode) == 0o700
    own.chmod(0o755)  # somebody else's trap
    monkeypatch.setenv("HOME", "before")
    surroundings._find_home()
    assert os.environ["HOME"] == ("/nonexistent" if home is None else "before")


def test_a_random_uid_without_a_home(tmp_path: Path) -> None:
    """As OpenShift starts a container: a uid that no passwd knows. It may read everything here, as there."""
    other = "--reuid 12345 --clear-groups --inh-caps=-all,+dac_read_search --ambient-caps=-all,+dac_read_search"
    unset = [f"--unset={name}" for name in ("HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME")]
    command = ["setpriv", *other.split(), "env", *unset, f"TMPDIR={tmp_path}", *LLAMAMEM]
    if os.getuid() != 0 or subprocess.run([*command, "--version"], capture_output=True).returncode:
        pytest.skip("another user can be had by root with setpriv alone")
    os.chown(tmp_path, 12345, 0)
    done = subprocess.run([*command, "ps"], capture_output=True, text=True, cwd="/")
    assert (tmp_path / "llamamem-12345").is_dir()
    assert (done.returncode, done.stderr) == (0, "no server runs; start one with `llamamem serve`\n")
