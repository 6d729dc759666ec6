"""The demo: a sidecar made, served, talked to, checked and stopped, with the commands a user would type.

The model is a random Gemma 4 of 400,000 weights, so what it says is gibberish. What can be seen on it is that the
memory is live: it is written with every token, it changes the output, and with its deltas zeroed it changes nothing.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamamem.errors import LlamamemError
from llamamem.proof.smoke import SmokeReport, smoke
from llamamem.serving.client import Client

_DATA = Path("tests") / "data" / "model_a"
_NEEDED = ("model-f32.gguf", "delta_mem_config.json", "adapter_metadata.json")
_QUESTIONS = ("hello there, what is the colour of the garden?", "and what did I ask before?")
_COMPARED = 32  # tokens of each greedy run
_LONGEST = 120.0  # seconds for any one step


@dataclass(frozen=True)
class Step:
    """One thing that the demo shows: whether it holds, and what was seen."""

    what: str
    ok: bool
    seen: str


@dataclass(frozen=True)
class DemoReport:
    steps: tuple[Step, ...]
    smoke: SmokeReport

    @property
    def ok(self) -> bool:
        return all(step.ok for step in self.steps)


def demo_data(given: Path | None = None) -> Path:
    """The directory of the demo's model and adapter: the one given, or that of the checkout around us or around `.`."""
    roots = (Path(__file__).resolve().parents[2], Path.cwd())
    candidates = (given,) if given is not None else tuple(root / _DATA for root in roots)
    for directory in candidates:
        if all((directory / name).is_file() for name in _NEEDED):
            return directory
    places = " and ".join(str(directory) for directory in dict.fromkeys(candidates))
    raise LlamamemError(
        f"the demo's model is not in {places} (it wants {', '.join(_NEEDED)});"
        " run the demo inside a checkout of llamamem, or give --data DIR"
    )


def demo(data: Path, *, bin_dir: Path, show: Callable[[Step], None] = lambda step: None) -> DemoReport:
    """Runs it all; `show` is called with each step as it is known. Raises LlamamemError when a step cannot be run."""
    steps: list[Step] = []

    def report(what: str, ok: bool, seen: str) -> None:
        steps.append(Step(what, ok, seen))
        show(steps[-1])

    with tempfile.TemporaryDirectory(prefix="llamamem-demo-") as scratch:
        model, sidecar = data / "model-f32.gguf", Path(scratch) / "sidecar.gguf"
        _llamamem("sidecar", "export", str(data), "--base", str(model), "--output", str(sidecar))
        report("sidecar exported", sidecar.is_file(), f"{sidecar.stat().st_size:,} bytes")

        serve = ["--model", str(model), "--sidecar", str(sidecar), "--port", "0", "--ctx-size", "1024"]
        serve += ["--bin-dir", str(bin_dir), "--slot-dir", str(Path(scratch) / "slots")]
        with _served(serve) as (process, run):
            report("server ready", True, f"{run['url']}, profile {run['profile']}")
            with Client(run["url"], timeout=_LONGEST) as client:
                _talk(client, run, report)
            process.send_signal(signal.SIGTERM)
            status = process.wait(_LONGEST)
            report("server stopped", status == 0, f"exit status {status}")

        result = smoke(model, sidecar, bin_dir=bin_dir, prompt=_QUESTIONS[0], n_predict=_COMPARED, ctx_size=512)
        parted = f"at new token {result.parted_token}" if result.parted_token is not None else "not by token"
        report("base and sidecar part", result.parted, parted)
        same = f"{_COMPARED} tokens, byte for byte" if result.zeroed_equals_base else f"base {result.base.text!r}"
        report("base and zeroed sidecar agree", result.zeroed_equals_base, same)
    return DemoReport(tuple(steps), result)


def _talk(client: Client, run: dict[str, Any], report: Callable[[str, bool, str], None]) -> None:
    memory = client.props().get("rwkv_ms") or {}
    shape = " ".join(f"{key}={memory.get(key)}" for key in ("layers", "rank", "states", "chunk", "semantics", "mode"))
    report("/props names this sidecar", memory.get("sidecar_sha256") == run["sidecar_sha256"] is not None, shape)

    messages: list[dict[str, str]] = []
    before = 0
    for question in _QUESTIONS:
        messages.append({"role": "user", "content": question})
        answer = client.chat(messages, max_tokens=24)
        text = answer["choices"][0]["message"]["content"] or ""
        messages.append({"role": "assistant", "content": text})
        usage = answer["usage"]
        shown = "".join(c if c.isprintable() else "·" for c in text)
        report(f"chat: {question}", usage["completion_tokens"] > 0, f"{usage['completion_tokens']} tokens: {shown}")
        state = client.slots()[0].get("rwkv_ms") or {}
        written, norms = state.get("tokens_written", 0), state.get("norms", [])
        alive = written > 0 and written != before and any(norm > 0 for norm in norms)
        norm_text = " ".join(f"{norm:.3g}" for norm in norms)
        report("memory was written", alive, f"{written} tokens, state norms {norm_text}")
        before = written


def _llamamem(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "llamamem.cli", *arguments],
        capture_output=True, text=True, errors="replace", timeout=_LONGEST, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise LlamamemError(f"llamamem {arguments[0]} exited with {done.returncode}: {done.stderr.strip()[-400:]}")


@contextmanager
def _served(arguments: list[str]) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """`llamamem serve` as a process of its own, once it has printed its run. It never outlives the block."""
    with tempfile.TemporaryFile("w+", errors="replace") as talk:
        process = subprocess.Popen(
            [sys.executable, "-m", "llamamem.cli", "serve", "--json", *arguments],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=talk, text=True,
        )  # fmt: skip
        watchdog = threading.Timer(_LONGEST, process.terminate)
        watchdog.start()
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            watchdog.cancel()
            if not line:
                process.wait(_LONGEST)
                talk.seek(0)
                last = [text.strip() for text in talk.read().splitlines() if text.strip()][-1:]
                raise LlamamemError(f"llamamem serve exited with {process.returncode}: {' '.join(last)}")
            yield process, json.loads(line)
        finally:
            watchdog.cancel()
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
            if process.stdout is not None:
                process.stdout.close()
