"""llama-completion with a sidecar: session files hold the memory, and what the mode does not allow is refused."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from llamamem.native.build import find_build

MODEL_A = Path(__file__).parents[1] / "data" / "model_a"
PROMPT = "hello there what is the colour of the garden"


def complete(
    prompt: str, *options: str | Path, sidecar: bool = True, n: int = 12
) -> subprocess.CompletedProcess[bytes]:
    """One greedy completion; stdout is the generated text alone."""
    command = [find_build().bin_dir / "llama-completion", "-m", MODEL_A / "model-f32.gguf", "-p", prompt, "-n", str(n)]
    command += ["--temp", "0", "--top-k", "1", "--seed", "123", "-no-cnv", "--no-warmup", "--no-display-prompt"]
    if sidecar:
        command += ["--rwkv-ms-sidecar", MODEL_A / "sidecar-v1.gguf"]
    return subprocess.run([*command, *options], capture_output=True, timeout=120)


@pytest.mark.parametrize("mode", [("--rwkv-ms-mode", "fused"), ("--ubatch-size", "1")], ids=["fused", "serial"])
def test_a_session_file_continues_as_if_nothing_had_happened(tmp_path: Path, mode: tuple[str, ...]) -> None:
    session = tmp_path / "session.bin"
    assert complete(PROMPT, *mode, "--prompt-cache", session, n=1).returncode == 0
    longer = PROMPT + " and more words"
    resumed = complete(longer, *mode, "--prompt-cache", session)
    assert b"session file matches" in resumed.stderr
    assert resumed.returncode == 0
    assert resumed.stdout == complete(longer, *mode).stdout
    assert resumed.stdout != complete(longer, sidecar=False).stdout


def test_a_session_without_memory_is_refused(tmp_path: Path) -> None:
    session = tmp_path / "session.bin"
    assert complete(PROMPT, "--prompt-cache", session, sidecar=False, n=1).returncode == 0
    refused = complete(PROMPT + " and more words", "--rwkv-ms-mode", "fused", "--prompt-cache", session)
    assert refused.returncode == 1
    assert b"[state-no-memory]" in refused.stderr


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ((), b"--ubatch-size"),
        (("--rwkv-ms-mode", "quick"), b"serial, fused or batched"),
        (("--rwkv-ms-mode", "fused", "--parallel", "2"), b"--parallel 2"),
        (("--rwkv-ms-mode", "fused", "--rwkv-ms-sidecar", MODEL_A / "model-f32.gguf"), b"rwkv_ms_memory"),
    ],
)
def test_what_cannot_be_right_is_refused(options: tuple[str, ...], reason: bytes) -> None:
    refused = complete(PROMPT, *options)
    assert refused.returncode == 1
    assert reason in refused.stderr
    assert refused.stdout == b""


def test_the_reason_is_not_lost_on_the_way_out() -> None:
    """The log is written by a thread; stock lost its last lines in one run of eight."""
    for _ in range(40):
        assert b"unable to create context" in complete(PROMPT).stderr
