"""The launcher and the checks on top of it, as a user runs them, against the real binaries."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from llamamem.native.build import Build
from llamamem.proof.smoke import smoke
from llamamem.serving.client import Client
from llamamem.serving.profiles import OPTIONS, owner_of, owner_of_variable

LLAMAMEM = [sys.executable, "-m", "llamamem.cli"]


def help_faults(text: str, reviewed: set[str]) -> list[str]:
    """What of `llama-server --help` the table of options does not know as it should."""
    faults: list[str] = []
    seen: set[str] = set()
    for entry in re.split(r"\n(?=-)", text):
        head = re.match(r"-[^\s,]+(?:,\s+-[^\s,]+)*", entry)
        if head is None or head.group().startswith("-----"):
            continue
        spellings = re.split(r",\s+", head.group())
        seen.update(spellings)
        owners = {owner_of(spelling, OPTIONS) for spelling in spellings}
        if len(owners) > 1:
            faults.append(f"{spellings} belong to {owners}")
        variables = re.findall(r"\(env: (\w+)\)", entry)
        if any(spelling.startswith("--no-") for spelling in spellings):  # upstream reads that variable, too
            variables += [name.replace("LLAMA_ARG_", "LLAMA_ARG_NO_") for name in variables]
        faults += [
            f"{spellings} have the variable {name} of {owner_of_variable(name, OPTIONS)}"
            for name in variables
            if {owner_of_variable(name, OPTIONS)} != owners
        ]
        if owners == {None}:
            faults += [f"{name} is new: own it, or add it to {REVIEWED.name}" for name in set(spellings) - reviewed]
    for key, option in OPTIONS.items():
        stale = [spelling for spelling in option.spellings if not spelling.endswith("*") and spelling not in seen]
        faults += [f"{key}: {name} is no option of llama-server" for name in stale]
    return faults + [f"{REVIEWED.name}: {name} is no option of llama-server" for name in sorted(reviewed - seen)]


REVIEWED = Path(__file__).with_name("options_let_through.txt")


@pytest.fixture(scope="module")
def help_text(build: Build) -> str:
    done = subprocess.run([f"{build.bin_dir}/llama-server", "--help"], capture_output=True, text=True)
    assert done.stdout.count("\n-") > 150
    return done.stdout


@pytest.fixture
def reviewed() -> set[str]:
    lines = REVIEWED.read_text(encoding="utf-8").splitlines()
    return {line for line in lines if line.startswith("-")}


def test_every_spelling_in_the_help_is_known(help_text: str, reviewed: set[str]) -> None:
    """An option that upstream adds, or gives another alias or variable, must not slip past the profile that owns it."""
    assert help_faults(help_text, reviewed) == []


@pytest.mark.parametrize(
    "old, new, said",
    [
        ("-ub,   --ubatch-size N", "-ub,   --ubatch-size, --micro-batch N", "--micro-batch"),
        ("(env: LLAMA_ARG_UBATCH)", "(env: LLAMA_ARG_MICROBATCH)", "LLAMA_ARG_MICROBATCH of None"),
        ("-ub,   --ubatch-size N", "-ub N", "--ubatch-size is no option"),
        ("\n--cache-reuse N", "\n--reuse-harder N   x\n--cache-reuse N", "--reuse-harder is new"),
    ],
    ids=["alias", "variable", "renamed", "new option"],
)
def test_a_help_that_changed_is_noticed(help_text: str, reviewed: set[str], old: str, new: str, said: str) -> None:
    assert old in help_text
    assert said in "; ".join(help_faults(help_text.replace(old, new), reviewed))


def test_serve_is_ready_answers_and_stops_on_a_signal(model: Path, sidecar: Path) -> None:
    command = [*LLAMAMEM, "serve", "--model", str(model), "--sidecar", str(sidecar), "--port", "0", "--json"]
    with subprocess.Popen([*command, "--ctx-size", "512"], stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        run = json.loads(launcher.stdout.readline())
        assert run["profile"] == "serial" and run["state"] == "ready"
        with Client(run["url"]) as client:
            answer = client.chat([{"role": "user", "content": "hello there"}], max_tokens=4)
            assert answer["usage"]["completion_tokens"] > 0
            page = client.request("GET", "/")
            assert page.status_code == 200 and "llamamem chat" in page.text
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
