"""Makes the demo model from nothing: the base, its adapter, and both as the server reads them. Seeded, under an hour.

    python tools/make_demo_model.py --output llamamem/demo --log demo.log

Needs PyTorch (pip install 'llamamem[reference]'). `--only adapter` keeps the base that is there and trains the adapter,
from where an earlier run of it was stopped.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import deque
from pathlib import Path
from typing import TextIO

from llamamem.errors import LlamamemError
from llamamem.formats.base import file_sha256
from llamamem.formats.demo_files import ADAPTER, BASE, MODEL, SIDECAR
from llamamem.formats.sidecar.export import export_sidecar
from llamamem.reference.gguf_base import convert_base
from llamamem.reference.require import require_torch

LIMIT = 6_000_000  # bytes of all files together


class Log:
    """What happened, with the seconds since the start, on standard error and in a file."""

    def __init__(self, file: TextIO | None) -> None:
        self._file = file
        self._start = time.monotonic()

    def __call__(self, text: str) -> None:
        line = f"{time.monotonic() - self._start:6.0f} s  {text}"
        for out in (sys.stderr, self._file):
            if out is not None:
                print(line, file=out, flush=True)


def make_base(folder: Path, seed: int, log: Log) -> None:
    """Trains the base and writes it in Hugging Face's form."""
    from llamamem.reference.demo_base import save_base, train_base

    recent: deque[tuple[float, float]] = deque(maxlen=50)

    def report(step: int, loss: float, right: float) -> None:
        recent.append((loss, right))
        if step % 50 == 0:
            loss, right = (sum(values) / len(recent) for values in zip(*recent, strict=True))
            log(f"base     step {step:4}  loss {loss:.3f}  known surnames right {right:.2f}")

    model = train_base(seed, report=report)
    log(f"base     {sum(p.numel() for p in model.parameters()):,} parameters")
    folder.mkdir(parents=True, exist_ok=True)
    save_base(model, folder)


def make_adapter(base: Path, folder: Path, seed: int, log: Log) -> None:
    """Trains the adapter on the recall task and writes its checkpoint."""
    from llamamem.reference import train_run
    from llamamem.reference.train import STATE, Progress

    recent: deque[float] = deque(maxlen=20)
    stage = -1

    def show(progress: Progress, total: int) -> None:
        nonlocal stage
        recent.append(progress.recall or 0.0)
        if progress.stage != stage or progress.step % 50 == 0:
            stage = progress.stage
            recall = sum(recent) / len(recent)
            log(f"adapter  step {progress.step:4}  stage {stage}  loss {progress.loss:.3f}  recall {recall:.3f}")

    state = folder / STATE
    request = train_run.Request(base=base, output=folder, seed=seed, save_every=25, resume=state.is_file())
    if request.resume:
        log("adapter  goes on where it was stopped")
    train_run.run(request, show)
    state.unlink()


def pack(output: Path, log: Log) -> None:
    """The base as GGUF, the adapter as a sidecar for it, and a list of it all."""
    convert_base(output / BASE, output / MODEL, "llamamem-demo")
    (output / SIDECAR).unlink(missing_ok=True)
    export_sidecar(output / ADAPTER, output / MODEL, output / SIDECAR)
    files = sorted(path for path in output.rglob("*") if path.is_file() and path.suffix not in (".py", ".md", ".log"))
    size = sum(path.stat().st_size for path in files)
    for path in files:
        log(f"file     {path.stat().st_size:9,}  {file_sha256(path)[:16]}  {path.relative_to(output)}")
    log(f"file     {size:9,}  together")
    if size > LIMIT:
        raise LlamamemError(f"{output}: {size:,} bytes, more than {LIMIT:,}", exit_status=1)


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes the demo model from nothing.")
    parser.add_argument("--output", type=Path, required=True, help="directory to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("adapter", "pack"), help="keep what comes before it")
    parser.add_argument("--log", type=Path, help="write what happened to this file as well")
    args = parser.parse_args()
    require_torch("make_demo_model.py")
    import torch
    import transformers

    torch.set_num_threads(1)  # the same sums in the same order, and no slower at this size
    with args.log.open("a" if args.only else "w") if args.log else open(os.devnull, "w") as file:
        log = Log(file)
        log(f"torch {torch.__version__}, transformers {transformers.__version__}, seed {args.seed}")
        if args.only is None:
            make_base(args.output / BASE, args.seed, log)
        if args.only != "pack":
            make_adapter(args.output / BASE, args.output / ADAPTER, args.seed, log)
        pack(args.output, log)
        log("done; `llamamem recall --data DIR` measures it on the server")


if __name__ == "__main__":
    try:
        main()
    except (LlamamemError, OSError) as e:
        print(f"make_demo_model: error: {e}", file=sys.stderr)
        sys.exit(e.exit_status if isinstance(e, LlamamemError) else 2)
