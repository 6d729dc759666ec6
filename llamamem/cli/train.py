"""`llamamem train`: an adapter on a frozen base. Needs PyTorch."""

from __future__ import annotations

import json
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from llamamem.cli.base import base_file
from llamamem.errors import LlamamemError
from llamamem.reference.require import require_torch

if TYPE_CHECKING:
    from llamamem.reference import train as training
    from llamamem.reference import train_run


class Kind(str, Enum):
    rwkv_ms = "rwkv_ms"
    delta_rule = "delta_rule"


class Start(str, Enum):
    recall = "recall"
    original = "original"


def register(app: typer.Typer) -> None:
    app.command("train")(train_command)


def train_command(
    base: Annotated[
        Path, typer.Option(help="Directory of the base in Hugging Face's form, or its GGUF.", callback=base_file)
    ],
    output: Annotated[
        Path | None, typer.Option(help="Checkpoint directory to write; with --compare a directory for its results.")
    ] = None,
    memory: Annotated[Kind, typer.Option(help="Kind of a new adapter; its checkpoint has the layout of its kind.")] = (
        Kind.rwkv_ms
    ),
    start: Annotated[
        Start,
        typer.Option(help="What a new adapter starts as: original, as the first implementations do, or recall, ours."),
    ] = Start.recall,
    compare: Annotated[
        bool, typer.Option("--compare", help="Train both kinds, matched, with several seeds, and compare them.")
    ] = False,
    seeds: Annotated[int, typer.Option(min=1, help="Of --compare, from --seed on.")] = 3,
    episodes: Annotated[int, typer.Option(min=16, help="Fresh ones that each run of --compare is judged on.")] = 128,
    data: Annotated[Path | None, typer.Option(help="Chats as JSON Lines; without it, the recall task.")] = None,
    steps: Annotated[
        int | None, typer.Option(min=5, help="Steps, with --data (200 unless given) and --compare (250).")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Conversations a step, with --data (8) and --compare (24).")
    ] = None,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 5e-3,
    weight_decay: Annotated[float, typer.Option(min=0, help="Of matrices; it keeps the states small.")] = 0.2,
    segment: Annotated[int, typer.Option(min=2, help="Tokens that are read at once.")] = 256,
    bptt: Annotated[int, typer.Option(min=0, help="Segments that a gradient runs back over; 0: all.")] = 0,
    layers: Annotated[str, typer.Option(help="Target layers of a new adapter, or all.")] = "0,1,2,3,4,5",
    rank: Annotated[int, typer.Option(min=1, help="Of a new adapter.")] = 8,
    heads: Annotated[int, typer.Option(min=1, help="State heads of a new adapter.")] = 1,
    states: Annotated[int, typer.Option(min=1, help="Of a new RWKV-MS.")] = 4,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens before RWKV-MS writes to its next state.")] = 1024,
    semantics: Annotated[int, typer.Option(min=1, max=2, help="Of a new RWKV-MS.")] = 1,
    init: Annotated[Path | None, typer.Option(help="Checkpoint directory to start from, instead of a new one.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where --output stopped.")] = False,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 100,
    seed: Annotated[int, typer.Option(help="The same seed and --threads give the same adapter.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="Of PyTorch; more are seldom faster for a small base.")] = 1,
    smoke: Annotated[bool, typer.Option("--smoke", help="Two steps that fail unless something trains.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end.")] = False,
) -> None:
    """Train a memory adapter on a frozen base, and write it as a checkpoint that `sidecar export` takes.

    A line of --data is {"messages": [...]} or {"sessions": [[...], [...]]}: the KV cache is dropped between sessions,
    the memory is carried on, and what the assistant says is learnt. Without --data the recall task of the demo model is
    trained, whose base is in llamamem/demo/base.

    --compare trains RWKV-MS and the delta rule on the recall task: the same base, data, seeds, steps and number of
    trained values (the width of RWKV-MS' low-rank matrices makes up for the difference), and prints recall and loss
    side by side, with 95 % intervals over seeds. Runs that are in --output are not run again.

    Exit status: 0 done, 1 a check of --smoke failed or training went astray, 2 it could not be run.
    """
    require_torch("llamamem train")
    from llamamem.reference import train_run

    request = train_run.Request(
        base=base, output=output, data=data, steps=steps or 200, batch=batch or 8, lr=lr, weight_decay=weight_decay,
        segment=segment, bptt=bptt, memory=memory.value, start=start.value, layers=_layers(layers), rank=rank,
        heads=heads, states=states, chunk=chunk, semantics=semantics, init=init, resume=resume, save_every=save_every,
        seed=seed, threads=threads,
    )  # fmt: skip
    if compare:
        if data or init or resume or smoke or output is None:
            raise LlamamemError("--compare is of the recall task and of new adapters: give it --output DIR, and none of"
                                " --data, --init, --resume and --smoke")  # fmt: skip
        _compare(request, output, steps or 250, batch or 24, seeds, episodes, as_json)
        return
    if smoke:
        checks = train_run.smoke(request)
        console = Console(stderr=as_json, highlight=False, soft_wrap=True)
        for check in checks:
            console.print(f"{'[green]ok  [/]' if check.ok else '[red]FAIL[/]'} {check.what}: [dim]{check.seen}[/]")
        ok = all(check.ok for check in checks)
        if as_json:
            print(json.dumps({"ok": ok, "checks": [vars(check) for check in checks]}))
        raise typer.Exit(0 if ok else 1)
    if output is None:
        raise LlamamemError("train needs --output DIR, or --smoke")
    result = _run(request)
    if as_json:
        print(json.dumps(result))


def _compare(
    request: train_run.Request, output: Path, steps: int, batch: int, seeds: int, episodes: int, as_json: bool
) -> None:
    from dataclasses import replace

    from llamamem.lab import kinds

    output.mkdir(parents=True, exist_ok=True)
    request = replace(request, output=None, stages=kinds.stages(steps, batch))
    plan = kinds.Plan(request, tuple(range(request.seed, request.seed + seeds)), episodes)
    lines = kinds.compare(plan, output / "runs.jsonl", lambda text: print(text, file=sys.stderr, flush=True))
    found = kinds.table(plan, lines)
    (output / "report.md").write_text(found.markdown(), encoding="utf-8")
    if as_json:
        print(json.dumps(kinds.as_json(plan, lines)))
    else:
        found.show(Console(highlight=False, soft_wrap=True))


def _run(request: object) -> dict[str, object]:
    from llamamem.reference import train_run

    assert isinstance(request, train_run.Request)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("training", total=None)

        def show(progress: training.Progress, total: int) -> None:
            recall = "" if progress.recall is None else f" recall {progress.recall:.2f}"
            text = f"stage {progress.stage} loss {progress.loss:.3f}{recall}"
            bar.update(task, completed=progress.step, total=total, description=text)
            if not console.is_terminal and (progress.step % 20 == 0 or progress.step == 1):
                print(f"llamamem: step {progress.step} {text}", file=sys.stderr, flush=True)

        result = train_run.run(request, show)
    print(f"llamamem: {request.output}: {result['steps']} steps, loss {result['loss']:.3f}", file=sys.stderr)
    return result


def _layers(text: str) -> tuple[int, ...]:
    if text == "all":
        return ()
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise LlamamemError(f"--layers {text}: give layer numbers with commas between, such as 0,1,2, or all") from None
