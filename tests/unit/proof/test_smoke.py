from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llamamem.cli import smoke as command
from llamamem.errors import LlamamemError
from llamamem.proof import smoke as module
from llamamem.proof.smoke import smoke

# Says "base" without a sidecar; with one, what its file holds. Tokens are the bytes of the text, after a prompt of 3.
FAKE = """
import struct, sys
from pathlib import Path
args = sys.argv[1:]
value = lambda name: args[args.index(name) + 1]
for flag in ("--temp 0", "--top-k 1", "--seed 123", "-ub 1", "-b 2"):
    assert flag in " ".join(args), flag
for flag in ("--no-warmup", "-no-cnv"):
    assert flag in args, flag
text = b"base line"
if "--memory-adapter" in args:
    assert value("--memory-mode") == "serial"
    text = Path(value("--memory-adapter")).read_bytes()
if text == b"crash":
    print("E common_init: error: tensor is missing", file=sys.stderr)
    sys.exit(1)
print("main: number of tokens in prompt = 3", file=sys.stderr)
tokens = [1, 2, 3, *text]
head = struct.pack("<4sII", b"nsgg", 10, len(tokens))
Path(value("--prompt-cache")).write_bytes(head + struct.pack(f"<{len(tokens)}i", *tokens) + b"state")
sys.stdout.buffer.write(text + b"\\nmain: saving final output to session file 'x'\\n\\n\\n")
"""


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    binary = tmp_path / "llama-completion"
    binary.write_text(f"#!{sys.executable}\n{FAKE}")
    binary.chmod(0o755)
    model = tmp_path / "base.gguf"
    model.touch()
    return model, tmp_path / "side.gguf"


def run(files: tuple[Path, Path], sidecar: str, zeroed: str, monkeypatch: pytest.MonkeyPatch) -> module.SmokeReport:
    model, path = files
    path.write_text(sidecar)
    monkeypatch.setattr(module, "zero_sidecar", lambda source, target: target.write_text(zeroed))
    return smoke(model, path, bin_dir=model.parent, prompt="abc", n_predict=9)


def test_passes_when_the_sidecar_parts_and_the_zeroed_one_does_not(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    report = run(files, "base lane", "base line", monkeypatch)
    assert report.ok and report.parted_token == report.parted_char == 6
    assert report.base.text == "base line" and report.sidecar.text == "base lane"
    assert report.base.tokens == tuple(b"base line")
    assert (report.base_token, report.sidecar_token) == (ord("i"), ord("a"))


def test_a_sidecar_without_effect_fails(files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    report = run(files, "base line", "base line", monkeypatch)
    assert not report.ok and report.zeroed_equals_base and report.parted_token is None


def test_a_zeroed_sidecar_with_effect_fails(files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    report = run(files, "base lane", "base linE", monkeypatch)
    assert not report.ok and report.parted


def test_a_text_that_only_ends_earlier_parts_at_its_end(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    report = run(files, "base", "base line", monkeypatch)
    assert (report.parted_token, report.base_token, report.sidecar_token) == (4, ord(" "), None)


def test_a_run_that_fails_says_why(files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LlamamemError, match=r"status 1: .*tensor is missing"):
        run(files, "crash", "base line", monkeypatch)


def test_a_run_that_writes_down_no_tokens_is_no_result(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts alone could be equal where tokens are not."""
    monkeypatch.setattr(module, "_session_tokens", lambda path: None)
    with pytest.raises(LlamamemError, match="did not write down its tokens"):
        run(files, "base lane", "base line", monkeypatch)


def test_missing_files_are_named(files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model, sidecar = files
    with pytest.raises(LlamamemError, match=r"sidecar .*side\.gguf: no such file"):
        smoke(model, sidecar, bin_dir=model.parent)
    (model.parent / "llama-completion").unlink()
    with pytest.raises(LlamamemError, match=r"llama-completion: no such binary; run `llamamem build`"):
        run(files, "base lane", "base line", monkeypatch)


@pytest.mark.parametrize(
    ("sidecar", "zeroed", "status", "said"),
    [
        ("base lane", "base line", 0, "part at new token 6 (counted from 0): 105 and 97"),
        ("base line", "base line", 1, "do not part"),
        ("base lane", "base linE", 1, "zeroed sidecar and base differ"),
    ],
)
def test_the_command_says_it_and_exits_so(
    llamamem: Callable[..., Any],
    files: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    sidecar: str,
    zeroed: str,
    status: int,
    said: str,
) -> None:
    model, path = files
    path.write_text(sidecar)
    monkeypatch.setattr(module, "zero_sidecar", lambda source, target: target.write_text(zeroed))
    monkeypatch.setattr(command, "find_build", lambda bin_dir: SimpleNamespace(bin_dir=model.parent))
    arguments = ("smoke", "--model", model, "--sidecar", path, "--prompt", "abc")
    plain, machine = llamamem(*arguments), llamamem(*arguments, "--json")
    assert plain.status == machine.status == status
    assert said in plain.out and "base line" in plain.out and sidecar in plain.out and "llamamem health" in plain.out
    report = json.loads(machine.out)
    assert report["ok"] is (status == 0) and report["zeroed"]["text"] == zeroed


def test_the_command_exits_2_when_it_cannot_be_run(llamamem: Callable[..., Any], files: tuple[Path, Path]) -> None:
    model, sidecar = files
    result = llamamem("smoke", "--model", model, "--sidecar", sidecar, "--bin-dir", model.parent)
    assert result.status == 2 and result.out == "" and result.err.startswith("llamamem: error: ")
