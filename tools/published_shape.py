"""The published delta-mem checkpoint's shape on a base of Qwen3-4B's, with random values, from export to bench.

    python tools/published_shape.py --folder /tmp/4b

36 layers, rank 8, deltas of q and o, 324 BF16 tensors, as declare-lab/delta-mem_qwen3_4b-instruct has them. The base
has Qwen3-4B's 36 layers (hidden 2560, 32 + 8 heads of 128, ffn 9728) as Q8_0, with a vocabulary of 8,192 instead of
151,936: 3.9 GB. What is done: export, validate, a comparison with PyTorch on the dequantised weights (layer by
layer, 2 GB of memory), a server in `batched` with two conversations at once, health, bench. Exit status 0: all holds.
`--preset tiny` does the same with a small base.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from llamamem.errors import LlamamemError
from llamamem.formats.checkpoint import read_checkpoint
from llamamem.formats.sidecar import read_sidecar
from llamamem.native.runtime import load_library
from llamamem.proof.effect import measure_effect
from llamamem.proof.serve_run import served
from llamamem.reference.require import require_torch
from llamamem.serving.client import Client

PUBLISHED = (324, 5_456_160)  # tensors and values
TOOLS = Path(__file__).parent


class Failed(Exception):
    """A step did not hold."""


def run(*command: str | Path) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Failed(f"{' '.join(map(str, command[2:5]))}: exit status {done.returncode}: {done.stderr or done.stdout}")
    return done.stdout


def llamamem(*command: str | Path) -> str:
    return run(sys.executable, "-m", "llamamem.cli", *command)


def make(folder: Path, preset: str) -> tuple[Path, Path, str]:
    base, sidecar, checkpoint = (folder / name for name in ("base.gguf", "memory.gguf", "checkpoint"))
    if not base.exists() or not checkpoint.exists():
        run(sys.executable, TOOLS / "make_model.py", "--arch", "qwen3", "--preset", preset, "--memory", "delta_rule",
            "--output", base, "--checkpoint", checkpoint)  # fmt: skip
    tensors = read_checkpoint(checkpoint).tensors
    counts = (len(tensors), sum(int(np.prod(tensor.shape)) for tensor in tensors.values()))
    if preset == "4b" and (counts != PUBLISHED or {tensor.dtype for tensor in tensors.values()} != {"BF16"}):
        raise Failed(f"the checkpoint has {counts} tensors and values, the published one {PUBLISHED}")
    sidecar.unlink(missing_ok=True)
    llamamem("sidecar", "export", checkpoint, "--base", base, "--output", sidecar)
    llamamem("sidecar", "validate", sidecar, "--base", base)
    made = read_sidecar(sidecar)
    numbers = sum(int(np.prod(tensor.shape)) for tensor in made.tensors.values())
    return base, sidecar, (
        f"{counts[0]} tensors, {counts[1]:,} values; exported {len(made.tensors)} and {numbers:,} of {made.kind} for"
        f" {made.base_arch}, {len(made.layers)} layers; valid"
    )  # fmt: skip


def compare(base: Path, sidecar: Path, n_tokens: int, threads: int) -> str:
    load_library()
    ids = np.random.default_rng(0).integers(263, 448, n_tokens)  # what is text in the random vocabulary
    effect = measure_effect(base, sidecar, ids, stream=True, threads=threads)
    if not effect.ok:
        raise Failed(effect.summary)
    return f"{n_tokens} tokens: {effect.summary}"


def serve(base: Path, sidecar: Path, threads: int) -> str:
    """Two conversations at once, then health."""
    given = ["--model", str(base), "--sidecar", str(sidecar), "--profile", "batched", "--port", "0"]
    given += ["--ctx-size", "4096", "--", "--threads", str(threads), "--threads-batch", str(threads)]
    with served(given) as server, Client(server.url, timeout=600) as client:

        def say(text: str) -> int:
            answer = client.completion(text, n_predict=8, temperature=0.0, return_tokens=True)
            return len(answer["tokens"])

        with ThreadPoolExecutor(2) as pool:
            answers = list(pool.map(say, ("the day that you", "one water is down")))
        report = json.loads(llamamem("health", "--run", server.run["run_id"], "--timeout", "600", "--json"))
    if not report["ok"]:
        raise Failed(f"health: {report}")
    checks = [check["id"] for check in report["checks"] if check.get("ok")]
    return f"batched: {answers} new tokens of two conversations at once; health holds: {', '.join(checks)}"


def bench(base: Path, sidecar: Path, threads: int, repeat: int) -> str:
    given = ("--prompt", "64", "--gen", "8", "--repeat", str(repeat), "--threads", str(threads))
    found: dict[str, Any] = json.loads(llamamem("bench", "--model", base, "--sidecar", sidecar, *given, "--json"))
    cells = [
        f"{name} {found[name]['ratio_cpu']:.3f} of CPU time, {found[name]['ratio_median']:.3f} of medians"
        for name in ("prefill", "decode")
    ]
    return f"sidecar / base: {'; '.join(cells)} ({threads} threads, {found['cpu']})"


def main() -> None:
    parser = argparse.ArgumentParser(description="The published checkpoint's shape, from export to bench.")
    parser.add_argument("--folder", type=Path, required=True, help="for the files, 4 GB; what is there is used again")
    parser.add_argument("--preset", choices=("4b", "wide", "tiny"), default="4b")
    parser.add_argument("--tokens", type=int, default=24, help="to compare with PyTorch")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3, help="of bench")
    args = parser.parse_args()
    require_torch("the comparison with PyTorch")
    args.folder.mkdir(parents=True, exist_ok=True)

    def said(step: str, text: str) -> None:
        print(f"{step:8} {text}", flush=True)

    base, sidecar, text = make(args.folder, args.preset)
    said("export", text)
    said("PyTorch", compare(base, sidecar, args.tokens, args.threads))
    said("serve", serve(base, sidecar, args.threads))
    said("bench", bench(base, sidecar, args.threads, args.repeat))


if __name__ == "__main__":
    try:
        main()
    except (LlamamemError, Failed, OSError) as e:
        print(f"published_shape: error: {e}", file=sys.stderr)
        sys.exit(1)
