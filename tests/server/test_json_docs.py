"""docs/json.md against what the commands print."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import json_docs
import make_cli_docs
import pytest

from llamamem.native.build import Build

Print = Callable[..., Any]

DATA = Path(__file__).resolve().parents[1] / "data"
A = DATA / "model_a"
DOCUMENTED = json_docs.sections()
LOGITS = ("--ids", f"{A}/logits.npz:p1_ids", "--logits", f"{A}/logits.npz:p1_mem_v1")
GREEDY = {"do_sample": False, "sample_seed": 1, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
TRACE = {
    "schema": "delta_mem_rwkv_ms_reference_trace.v1",
    "generation": {"prompt": "hello", "max_new_tokens": 3, **GREEDY},
    "result": {"assistant_display": "abc"},
    "session": {"processed_input_ids": [2, 5, 6]},
}


@pytest.fixture
def printed(llamamem: Callable[..., Any]) -> Print:
    """`printed("ps")`: what it prints with --json, which is one object and nothing else."""

    def run(*arguments: str | Path) -> Any:
        result = llamamem(*arguments, "--json")
        assert result.out.count("\n") == 1, result.err
        return json.loads(result.out)

    return run


@pytest.fixture
def zeroed(llamamem: Callable[..., Any], sidecar: Path, tmp_path: Path) -> Path:
    assert llamamem("sidecar", "zero", sidecar, "--output", tmp_path / "zeroed.gguf").status == 0
    return tmp_path / "zeroed.gguf"


def hold(**outputs: list[Any]) -> None:
    """`hold(session_list=[...])`: these outputs are as documented."""
    found = {}
    for name, given in outputs.items():
        heading = "llamamem " + name.replace("_", " ").replace(" dry run", " --dry-run").replace(" probe", " --probe")
        found[heading] = json_docs.faults(given, DOCUMENTED[heading])
    assert {heading: faults for heading, faults in found.items() if faults} == {}


def test_the_page_has_every_command_with_json_and_no_other() -> None:
    commands = {path: make_cli_docs.parameters(callback) for path, callback, _ in make_cli_docs.commands()}
    with_json = {path for path, parameters in commands.items() if "as_json" in {p.name for p, _, _ in parameters}}
    assert {heading for heading in DOCUMENTED if heading.startswith("llamamem ")} == {
        *with_json,
        "llamamem serve --dry-run",
        "llamamem health --probe",
    }


def test_what_is_not_documented_or_does_not_come_is_found() -> None:
    fields = {"ok": "boolean", "n": "integer or null", "list[].a": "number", "rare": "string, may be missing"}
    assert json_docs.faults([{"ok": True, "n": 1, "list": [{"a": 1.5}, {"a": 2}]}], fields) == []
    assert json_docs.faults([{"ok": True, "n": None, "list": [{"a": 1}], "rare": "x"}], fields) == []
    for wrong in ({"ok": 1}, {"n": 1.5}, {"n": True}, {"list": [{"a": "1"}]}, {"more": 1}, {"list": [{"b": 1}]}):
        assert json_docs.faults([{"ok": True, "n": 1, "list": [{"a": 1}], **wrong}], fields), wrong
    assert json_docs.faults([{"ok": True, "list": [{"a": 1}]}], fields) == ["n: documented, and never there"]


def test_the_catalogue(printed: Print) -> None:
    hold(pull=[printed("pull")])


def test_sidecars(printed: Print, sidecar: Path, zeroed: Path, model: Path) -> None:
    hold(
        sidecar_inspect=[
            printed("sidecar", "inspect", sidecar),
            printed("sidecar", "inspect", sidecar, "--memory-dir", A),
        ],
        sidecar_validate=[
            printed("sidecar", "validate", model),
            printed("sidecar", "validate", sidecar, "--base", model, "--runtime"),
        ],
        sidecar_compare=[printed("sidecar", "compare", sidecar, zeroed), printed("sidecar", "compare", sidecar, A)],
    )


@pytest.mark.slow
def test_the_runtime(printed: Print, build: Build, sidecar: Path, model: Path, tmp_path: Path) -> None:
    files = ("--model", model, "--sidecar", sidecar)
    states = ("--states", f"{A}/logits.npz", "--states-prefix", "p1_v1_")
    hold(
        build=[printed("build")],
        doctor=[printed("doctor")],
        fixture_check=[printed("fixture", "check", *sorted((DATA / "layers").glob("*_t1_*.npz")))],
        parity=[printed("parity", *files, *LOGITS, *states), printed("parity", "--model", model, *LOGITS)],
        bench=[
            printed("bench", *files, "--prompt", "8", "--gen", "2", "--repeat", "1"),
            printed("bench", *files, "--prompt", "8", "--gen", "2", "--repeat", "1", "--profile"),
        ],
        smoke=[printed("smoke", *files, "-n", "4")],
        serve_dry_run=[printed("serve", *files, "--dry-run"), printed("serve", "--model", model, "--dry-run")],
    )


def test_the_demo(printed: Print) -> None:
    hold(
        demo=[printed("demo", "--episodes", "2")],
        recall=[printed("recall", "--episodes", "1", "--rows", "1:9,4:500")],
    )


@pytest.mark.slow
def test_a_server_and_its_sessions(printed: Print, sidecar: Path, model: Path, tmp_path: Path) -> None:
    suite, trace, kept = tmp_path / "suite.jsonl", tmp_path / "trace.json", tmp_path / "kept.jsonl"
    suite.write_text('{"id": "a", "prompt": "hello", "expect": {"contains": "?"}}\n{"id": "b", "prompt": "hi"}\n')
    trace.write_text(json.dumps(TRACE))
    store = ("--store", tmp_path / "store")
    slots = tmp_path / "slots"
    command = [sys.executable, "-m", "llamamem.cli", "serve", "--model", str(model), "--sidecar", str(sidecar)]
    command += ["--port", "0", "--ctx-size", "1024", "--slot-dir", str(slots), "--name", "mine", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as launcher:
        try:
            assert launcher.stdout is not None
            run = json.loads(launcher.stdout.readline())
            evaluated = [printed("eval", suite, "--max-tokens", "3", "--output", kept)]
            evaluated.append(printed("eval", suite, "--max-tokens", "3", "--compare", kept))
            started = printed("session", "start", "anna", *store)
            fresh = printed("session", "resume", "anna", "--slot", "0", *store)
            traced = [printed("trace", "compare", trace)]
            saved = printed("session", "save", "anna", "--slot", "0", *store)
            again = printed("session", "save", "anna", "--slot", "0", *store)
            resumed = printed("session", "resume", "anna", "--slot", "0", *store)
            branched = printed("session", "start", "kate", "--from", "anna", *store)
            listed = [printed("session", "list", *store), printed("session", "list", "--limit", "1", *store)]
            history = printed("session", "history", "anna", *store)
            undone = printed("session", "undo", "anna", *store)
            printed("session", "undo", "anna", *store)
            health = printed("health")
            probed = printed("health", "--probe")
            ps = printed("ps")
            (slots / "anna.bin").write_bytes(next((tmp_path / "store").rglob("*-3.state")).read_bytes())
            pruned = printed("session", "prune", "--older-than", "0m", *store)
            stopped = printed("stop", "mine")
            assert launcher.wait(30) == 0
        finally:
            launcher.send_signal(signal.SIGTERM)
    anna = slots / "anna.bin"
    state = ("state", "show", anna)
    assert run["name"] == "mine" and run["state"] == "ready"
    hold(
        serve=[run],
        ps=[ps, printed("ps", "--all")],
        stop=[stopped],
        health=[health],
        health_probe=[probed],
        eval=evaluated,
        trace_compare=traced,
        session_start=[started, branched],
        session_resume=[fresh, resumed],
        session_save=[saved, again],
        session_list=listed,
        session_history=[history],
        session_undo=[undone],
        session_prune=[pruned],
        state_show=[printed(*state), printed(*state, "--sidecar", sidecar)],
        state_diff=[printed("state", "diff", anna, anna)],
        state_verify=[printed("state", "verify", anna, model)],
    )
