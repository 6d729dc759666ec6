"""`llamamem lab`: what a recurrent state can hold, measured."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from llamamem.lab.mqar_presets import PRESETS
from llamamem.reference.require import require_torch

PresetName = Enum("PresetName", {name: name for name in PRESETS}, type=str)  # type: ignore[misc]


def register(app: typer.Typer) -> None:
    """Adds `llamamem lab dla` and `mqar`."""
    group = typer.Typer(help="Measure what a recurrent state can hold.", no_args_is_help=True)
    group.command()(mqar)
    app.add_typer(group, name="lab")


def mqar(
    output: Annotated[Path, typer.Option(help="Directory of runs.jsonl and what is made of it.")],
    preset: Annotated[PresetName, typer.Option(help="What to train: see docs/lab.md.")] = PresetName.cpu,
    device: Annotated[str, typer.Option(help="cpu, or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="Of PyTorch.")] = 1,
) -> None:
    """Train DeltaNet, RWKV-7, RWKV-MS and attention on associative recall, at equal states.

    Exit status: 0 every run is there, 2 it could not be run.
    """
    require_torch("llamamem lab mqar", "torch")
    from llamamem.lab.mqar import compare

    output.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    plan = PRESETS[preset.value]
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("runs", total=None)

        def show(run, epoch, loss, seen, done, total):
            text = f"{run.key} epoch {epoch}: loss {loss:.3f}, accuracy {seen:.3f}"
            bar.update(task, completed=done, total=total, description=text)

        def done(line):
            if not console.is_terminal:
                print(f"llamamem: {line['run']}: {line['steps']} steps, {line['accuracy']}", file=sys.stderr, flush=True)

        compare(plan, output / "runs.jsonl", device=device, threads=threads, show=show, done=done)
