"""`llamamem reference run`, as a user types it."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import json_docs
import pytest

torch = pytest.importorskip("torch", reason="needs llamamem[reference]")
pytest.importorskip("transformers", reason="needs llamamem[reference]")

from llamamem.formats.state import read_state  # noqa: E402
from llamamem.native.vendor import tree_path  # noqa: E402
from llamamem.proof.conversation_native import NativeConversation, started  # noqa: E402
from llamamem.proof.one_model import check_one_model  # noqa: E402

MODEL_A = Path(__file__).parents[1] / "data" / "model_a"
SIDECAR = MODEL_A / "sidecar-v1.gguf"


@pytest.fixture
def run(llamamem: Any) -> Any:
    def run(*args: str | Path) -> Any:
        return llamamem("reference", "run", "--base", MODEL_A, "--max-tokens", "6", *args)

    return run


def test_turns_are_answered_and_the_memory_goes_on_in_the_server(run: Any, tmp_path: Path) -> None:
    file = tmp_path / "anna.memory"
    done = run("--adapter", SIDECAR, "--save", file, "--json", "this is anna fox.", "and this is tom wood.")
    assert done.status == 0, done.err
    found = json.loads(done.out)
    assert [turn["prompt"] for turn in found["turns"]] == ["this is anna fox.", "and this is tom wood."]
    assert json_docs.faults([found], json_docs.sections()["llamamem reference run"]) == []
    n = found["turns"][-1]["tokens_written"]
    assert read_state(file).tokens_written.tolist() == [[n] * 6]
    with started(MODEL_A / "model-f32.gguf", SIDECAR, tmp_path) as (client, slots):
        native = NativeConversation(client, slots)
        native.resume(file.read_bytes())
        native.feed(2)
        (slots / "back.memory").write_bytes(native.save())
    done = run("--adapter", SIDECAR, "--load", slots / "back.memory", "--json", "who is anna?")
    turn = json.loads(done.out)["turns"][0]
    assert turn["tokens_written"] == n + 1 + turn["prompt_tokens"] + turn["new_tokens"] - 1


def test_frozen_and_scale(run: Any) -> None:
    def said(*args: str | Path) -> tuple[list[str], int]:
        done = run(*args, "--json", "this is anna fox.", "hello there", "who is anna?")
        assert done.status == 0, done.err
        turns = json.loads(done.out)["turns"]
        return [turn["answer"] for turn in turns], turns[-1]["tokens_written"]

    base, n = said()
    assert n == 0
    silent, n = said("--adapter", SIDECAR, "--scale", "0")
    assert silent == base and n > 0
    frozen, n = said("--adapter", SIDECAR, "--frozen")
    assert frozen == base and n == 0  # of nothing that was written, nothing is read
    assert said("--adapter", SIDECAR)[0] != base


def test_lines_of_stdin_are_turns(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n\nwho is anna?\n"))
    done = run("--adapter", SIDECAR)
    assert done.status == 0 and done.err.count("written to the memory]") == 2


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--save", "x"), "give --adapter"),
        (("--adapter", MODEL_A, "--save", "x"), "llamamem sidecar export"),
        (("--adapter", "nowhere"), "nowhere"),
        (("--adapter", SIDECAR, "--config", "c.json"), "config"),
        (("--adapter", SIDECAR, "--load", "missing.memory"), "state-unreadable"),
        (("--adapter", SIDECAR, "--load", SIDECAR), "state-format"),
    ],
)
def test_errors_are_one_line(
    run: Any, args: tuple[str | Path, ...], said: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run(*args, "hello")
    assert done.status == 2 and done.out == ""
    assert done.err.startswith("llamamem: error: ") and said in done.err and done.err.count("\n") == 1


@pytest.fixture
def no_template(tmp_path: Path) -> Path:
    """model_a without a chat template, as many a base is published."""
    folder = tmp_path / "base"
    shutil.copytree(MODEL_A, folder, ignore=shutil.ignore_patterns("*.npz", "*.gguf"))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    config = folder / "tokenizer_config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps({key: value for key, value in values.items() if key != "chat_template"}))
    return folder


@pytest.mark.parametrize("command", ["run", "parity"])
def test_a_base_without_a_chat_template(llamamem: Any, no_template: Path, command: str) -> None:
    """Exit status 2: 1 would mean that the two sides differ."""
    files = {
        "run": ("hello", "--base", no_template, "--max-tokens", "2"),
        "parity": ("--base", no_template, "--model", MODEL_A / "model-f32.gguf", "--sidecar", SIDECAR),
    }[command]
    done = llamamem("reference", command, *files)
    assert done.status == 2 and done.out == ""
    assert done.err.startswith("llamamem: error: ") and done.err.count("\n") == 1
    assert "chat template" in done.err and "chat_template.jinja" in done.err


def test_llama_cpps_converter_makes_the_base(tmp_path: Path) -> None:
    """As README says: the pinned tree's own, in the environment that has PyTorch."""
    script, made = tree_path() / "convert_hf_to_gguf.py", tmp_path / "base.gguf"
    command = [sys.executable, script, MODEL_A, "--outtype", "f32", "--outfile", made]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert check_one_model(made, MODEL_A / "model-f32.gguf").most == 0
