"""One MQAR comparison from start to end, or from where it stopped to its end. Needs PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from llamamem.errors import LlamamemError
from llamamem.lab.mqar_plan import Preset, Run
from llamamem.lab.mqar_results import Line, Results, of_plan
from llamamem.lab.mqar_train import train_run

# while a run is trained: it, epochs done, loss, validation accuracy; and runs done, runs in all
Show = Callable[[Run, int, float, float, int, int], None]


def compare(
    preset: Preset,
    path: Path,
    *,
    device: str = "cpu",
    threads: int = 1,
    show: Show = lambda *args: None,
    done: Callable[[Line, int, int], None] = lambda *args: None,
) -> list[Line]:
    """Trains every run whose line is not in the file yet, and tells `done` how many are; all lines of the file."""
    if device != "cpu" and not torch.cuda.is_available():
        raise LlamamemError(f"--device {device}: PyTorch sees no GPU here; leave it out for the CPU")
    torch.set_num_threads(threads)
    runs = preset.runs()
    with Results(path) as results:
        there = of_plan(results.lines, preset)
        for run in runs:
            if run.key not in there:

                def progress(epoch: int, loss: float, seen: float, run: Run = run, n: int = len(there)) -> None:
                    show(run, epoch, loss, seen, n, len(runs))

                outcome = train_run(preset, run, device=device, show=progress)
                there[run.key] = results.append(preset, run, outcome)
                done(there[run.key], len(there), len(runs))
        return results.lines
