"""The launcher and the checks on top of it, as a user runs them, against the real binaries."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil

from llamamem.native.build import Build
from llamamem.proof.smoke import smoke
from llamamem.serving.client import Client
from llamamem.serving.profiles import OPTIONS, owner_of, owner_of_variable

LLAMAMEM = [sys.executable, "-m", "llamamem.cli"]


def test_every_spelling_in_the_help_is_known(build: Build) -> None:
    """An option that upstream gives another alias or variable must not slip past the profile that owns it."""
    done = subprocess.run([f"{build.bin_dir}/llama-server", "--help"], capture_output=True, text=True)
    entries = re.split(r"\n(?=-)", done.stdout)
    assert len(entries) > 150
    seen: set[str] = set()
    for entry in entries:
        head = re.match(r"-[^\s,]+(?:,\s+-[^\s,]+)*", entry)
        if head is None:
            continue
        spellings = re.split(r",\s+", head.group())
        seen.update(spellings)
        owners = {owner_of(spelling, OPTIONS) for spelling in spellings}
        assert len(owners) == 1, f"{spellings} belong to {owners}"
        variable = re.search(r"\(env: (LLAMA_ARG_\w+)\)", entry)
        if variable is not None:
            assert owner_of_variable(variable.group(1), OPTIONS) == owners.pop(), f"{spellings} {variable.group(1)}"
    for key, option in OPTIONS.items():
        stale = [spelling for spelling in option.spellings if not spelling.endswith("*") and spelling not in seen]
        assert not stale, f"{key}: {stale} are not options of llama-server"


def test_serve_is_ready_answers_and_stops_on_a_signal(model: Path, sidecar: Path) -> None:
    command = [*LLAMAMEM, "serve", "--model", str(model), "--sidecar", str(sidecar), "--port", "0", "--json"]
    with subprocess.Popen([*command, "--ctx-size", "512"], stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        run = json.loads(launcher.stdout.readline())
        assert run["profile"] == "serial" and run["state"] == "ready"
        with Client(run["url"]) as client:
            answer = client.chat([{"role": "user", "content": "hello there"}], max_tokens=4)
            assert answer["usage"]["completion_tokens"] > 0
        launcher.send_signal(signal.SIGINT)
        assert launcher.wait(30) == 0
    assert not psutil.pid_exists(run["pid"])


def test_serve_refuses_owned_flags_before_anything_starts(model: Path, sidecar: Path) -> None:
    command = [*LLAMAMEM, "serve", "--model", str(model), "--sidecar", str(sidecar), "--", "-ub=8", "-np", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert "-ub=8" in done.stderr and "-np" in done.stderr and "Traceback" not in done.stderr


def test_smoke_parts_base_and_sidecar_and_not_the_zeroed_one(build: Build, model: Path, sidecar: Path) -> None:
    report = smoke(model, sidecar, bin_dir=Path(build.bin_dir), prompt="hello there, what is the colour", n_predict=24)
    assert report.base.tokens is not None and len(report.base.tokens) == 24
    assert report.parted and report.parted_token is not None
    assert report.sidecar.tokens is not None and report.zeroed == report.base
    part = report.parted_token
    assert report.base.tokens[:part] == report.sidecar.tokens[:part]
    assert report.base.tokens[part] != report.sidecar.tokens[part]


def test_demo_holds() -> None:
    done = subprocess.run([*LLAMAMEM, "demo", "--json"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["ok"] and all(step["ok"] for step in report["steps"])
