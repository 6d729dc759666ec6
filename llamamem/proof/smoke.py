"""The divergence smoke test: does the sidecar change what the model says, and a zeroed one change nothing?

`llama-completion` runs three times on one prompt, greedy, with the same flags: base alone, sidecar, sidecar with its
deltas zeroed. Base and sidecar must part; base and zeroed must be the same, token for token and byte for byte. That is
a sign of a live memory in one text; the proof by behaviour is `llamamem health`.
"""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from llamamem.errors import LlamamemError
from llamamem.formats.sidecar.copy import zero_sidecar

DEFAULT_PROMPT = "My name is Ada and I keep bees. What is my name, and what do I keep?"

# One token a microbatch in every run, the base's too: sums of floats in another order could part what must be equal.
_GREEDY = "--seed 123 --temp 0 --top-k 1 --no-warmup --no-escape -no-cnv -ub 1 -b 2".split()
_SESSION_HEAD = struct.Struct("<4sII")  # magic, version, number of tokens; then the tokens, i32 each
_SESSION_MAGIC = b"nsgg"


@dataclass(frozen=True)
class Generated:
    """What one run said: ids of the new tokens and their text."""

    tokens: tuple[int, ...]
    text: str


@dataclass(frozen=True)
class SmokeReport:
    """`parted_token`, `parted_char`: index among the new tokens or characters where base and sidecar first differ.

    Either is None when they do not differ there (special tokens have no text). `base_token` and `sidecar_token` are
    the ids at `parted_token`, None where that run had ended.
    """

    prompt: str
    base: Generated
    sidecar: Generated
    zeroed: Generated
    parted_token: int | None
    base_token: int | None
    sidecar_token: int | None
    parted_char: int | None
    zeroed_equals_base: bool

    @property
    def parted(self) -> bool:
        return self.parted_token is not None

    @property
    def ok(self) -> bool:
        return self.parted and self.zeroed_equals_base


def smoke(
    model: Path,
    sidecar: Path,
    *,
    bin_dir: Path,
    prompt: str = DEFAULT_PROMPT,
    n_predict: int = 48,
    ctx_size: int = 2048,
    timeout: float = 3600.0,
) -> SmokeReport:
    """Runs the three. Raises LlamamemError when a run cannot be made (not when the check fails)."""
    for what, path in (("base", model), ("sidecar", sidecar)):
        if not path.is_file():
            raise LlamamemError(f"{what} {path}: no such file; check the path")
    if not prompt or n_predict < 1:
        raise LlamamemError("smoke needs a prompt that is not empty and -n of 1 or more")
    common = ["--model", str(model), "--prompt", prompt, "--predict", str(n_predict), "--ctx-size", str(ctx_size)]
    with tempfile.TemporaryDirectory(prefix="llamamem-smoke-") as scratch:
        zeroed = Path(scratch) / "zeroed.gguf"
        zero_sidecar(sidecar, zeroed)
        base_run, sidecar_run, zeroed_run = (
            _generate(bin_dir, [*common, *memory], Path(scratch) / f"{i}.session", timeout)
            for i, memory in enumerate(([], _memory(sidecar), _memory(zeroed)))
        )
    part = _first_difference(base_run.tokens, sidecar_run.tokens)
    base_token, sidecar_token = (
        run.tokens[part] if part is not None and part < len(run.tokens) else None for run in (base_run, sidecar_run)
    )
    return SmokeReport(
        prompt=prompt,
        base=base_run,
        sidecar=sidecar_run,
        zeroed=zeroed_run,
        parted_token=part,
        base_token=base_token,
        sidecar_token=sidecar_token,
        parted_char=_first_difference(base_run.text, sidecar_run.text),
        zeroed_equals_base=base_run == zeroed_run,
    )


def _memory(sidecar: Path) -> list[str]:
    return ["--memory-adapter", str(sidecar), "--memory-mode", "serial", "--memory-untested"]  # this is a test


def _generate(bin_dir: Path, arguments: list[str], session: Path, timeout: float) -> Generated:
    binary = bin_dir / "llama-completion"
    # The session file is the one place where llama-completion writes down the ids of its tokens.
    command = [str(binary), *arguments, *_GREEDY, "--no-display-prompt", "--verbose-prompt"]
    command += ["--prompt-cache", str(session), "--prompt-cache-all"]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout, check=False)
    except FileNotFoundError as e:
        raise LlamamemError(f"{binary}: no such binary; run `llamamem build`, or point --bin-dir at a build") from e
    except OSError as e:
        raise LlamamemError(f"{binary}: cannot run ({e.strerror})") from e
    except subprocess.TimeoutExpired as e:
        raise LlamamemError(f"{binary}: not done after {timeout:g} s; give a smaller -n") from e
    log = done.stderr.decode("utf-8", "replace")
    if done.returncode != 0:
        lines = [line.strip() for line in log.splitlines() if line.strip()]
        said = [line for line in lines if re.search(r"error|failed|refus|\bE \w", line, re.IGNORECASE)] or lines
        raise LlamamemError(
            f"{binary} exited with status {done.returncode}: {' | '.join(said[-4:]) or 'no reason given'}"
        )
    counted = re.search(r"number of tokens in prompt = (\d+)", log)
    tokens = _session_tokens(session)
    if tokens is None or counted is None:
        raise LlamamemError(f"{binary}: did not write down its tokens; it is not of this pin: run `llamamem build`")
    return Generated(tokens[int(counted.group(1)) :], _text(done.stdout.decode("utf-8", "replace")))


def _session_tokens(path: Path) -> tuple[int, ...] | None:
    try:
        data = path.read_bytes()
        magic, _, n = _SESSION_HEAD.unpack_from(data)
        return struct.unpack_from(f"<{n}i", data, _SESSION_HEAD.size) if magic == _SESSION_MAGIC else None
    except (OSError, struct.error):
        return None


def _text(stdout: str) -> str:
    """The generated text, without the line about the session file that llama-completion prints after it."""
    body, notice, _ = stdout.rpartition(": saving final output to session file ")
    return body.rpartition("\n")[0] if notice else stdout.rstrip("\n")


def _first_difference(a: tuple[int, ...] | str, b: tuple[int, ...] | str) -> int | None:
    if a == b:
        return None
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
