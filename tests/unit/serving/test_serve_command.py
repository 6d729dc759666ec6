"""`llamamem serve` as a process of its own, in front of a stand-in for llama-server."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from launched import LLAMAMEM


def command(fake_bin: Path, base: Path, *more: str) -> list[str]:
    head = [sys.executable, "-m", "llamamem.cli", "serve", "--model", str(base), "--bin-dir", str(fake_bin)]
    return [*head, "--port", "0", *more]


def runs() -> list[Path]:
    return sorted((Path(os.environ["XDG_STATE_HOME"]) / "llamamem" / "runs").glob("*.json"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_the_server_and_exits_with_0(fake_bin: Path, base: Path, number: int) -> None:
    with subprocess.Popen(command(fake_bin, base, "--json"), stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        run = json.loads(launcher.stdout.readline())
        assert run["state"] == "ready" and run["launcher_pid"] == launcher.pid and psutil.pid_exists(run["pid"])
        launcher.send_signal(number)
        assert launcher.wait(20) == 0
    assert not psutil.pid_exists(run["pid"])
    assert json.loads(runs()[0].read_text())["state"] == "stopped"


def test_a_stubborn_server_is_killed_and_that_is_exit_status_3(fake_bin: Path, base: Path) -> None:
    stubborn = command(fake_bin, base, "--json", "--grace", "0.3", "--", "--fake", "stubborn")
    with subprocess.Popen(stubborn, stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        run = json.loads(launcher.stdout.readline())
        launcher.terminate()
        assert launcher.wait(20) == 3
    assert not psutil.pid_exists(run["pid"])


def test_a_second_signal_does_not_wait_for_the_grace_time(fake_bin: Path, base: Path) -> None:
    stubborn = command(fake_bin, base, "--json", "--grace", "600", "--", "--fake", "stubborn")
    with subprocess.Popen(stubborn, stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        launcher.stdout.readline()
        launcher.terminate()
        with pytest.raises(subprocess.TimeoutExpired):
            launcher.wait(1)
        launcher.terminate()
        assert launcher.wait(20) == 3


@pytest.mark.parametrize(
    "mode, status, said",
    [
        ("dies", 1, "ended by itself: it exited with status 7"),
        ("crash", 2, "tensor blk.0.x is missing"),
        ("stall", 2, "logged nothing"),
    ],
)
def test_how_it_ended_is_the_exit_status(fake_bin: Path, base: Path, mode: str, status: int, said: str) -> None:
    line = command(fake_bin, base, "--stall-timeout", "1", "--", "--fake", mode)
    done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert done.returncode == status and done.stdout == ""
    assert said in done.stderr and "Traceback" not in done.stderr
    assert "fake: started" in done.stderr  # the log is shown in the foreground


def test_a_dry_run_prints_the_plan_and_starts_nothing(fake_bin: Path, base: Path) -> None:
    done = subprocess.run(
        command(fake_bin, base, "--dry-run", "--json", "--", "-t", "2"), capture_output=True, text=True, timeout=60
    )
    plan = json.loads(done.stdout)
    assert plan["profile"] == "base" and plan["argv"][-2:] == ["-t", "2"]
    assert done.returncode == 0 and runs() == []


def test_what_a_dry_run_prints_is_what_is_run(fake_bin: Path, base: Path, tmp_path: Path) -> None:
    odd = base.rename(tmp_path / "a base's name.gguf")
    line = command(fake_bin, odd, "--ctx-size", "64", "--parallel", "2")
    dry = subprocess.run([*line, "--dry-run"], capture_output=True, text=True, timeout=60)
    argv = shlex.split(dry.stdout.splitlines()[0])
    with subprocess.Popen([*line, "--json"], stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        run = json.loads(launcher.stdout.readline())
        launcher.terminate()
        assert launcher.wait(20) == 0
    assert run["argv"] == argv and argv[0] == str(fake_bin / "llama-server")
    assert (tmp_path / "started").read_text() == " ".join(argv) + "\n"


def test_two_sidecars_of_one_name_have_slots_of_their_own(fake_bin: Path, base: Path, tmp_path: Path) -> None:
    """Or the second server writes its anna.bin over that of the first."""
    places = []
    for folder in ("a", "b", "a"):
        sidecar = tmp_path / folder / "memory.gguf"
        sidecar.parent.mkdir(exist_ok=True)
        sidecar.write_text(folder)
        line = command(fake_bin, base, "--sidecar", str(sidecar), "--dry-run", "--json")
        done = subprocess.run(line, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        argv = json.loads(done.stdout)["argv"]
        places.append(argv[argv.index("--slot-save-path") + 1])
    assert places[0] == places[2] != places[1]
    assert all(Path(place).name.startswith("memory-") for place in places)


def test_a_refusal_is_one_line_and_exit_status_2(fake_bin: Path, base: Path) -> None:
    done = subprocess.run(command(fake_bin, base, "--", "--port=1"), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == "" and runs() == []
    assert done.stderr.startswith("llamamem: error: profile base owns these options") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [([], "--model is missing"), (["--demo", "--model", "x.gguf"], "leave --model and --sidecar out")],
)
def test_what_is_served_is_said_once(arguments: list[str], said: str) -> None:
    done = subprocess.run([*LLAMAMEM, "serve", *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert said in done.stderr and done.stderr.count("\n") == 1
