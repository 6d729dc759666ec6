"""`llamamem recall`: what a memory alone brings across a dropped KV cache, as a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from llamamem.errors import LlamamemError
from llamamem.formats.demo_files import demo_files
from llamamem.native.build import find_build
from llamamem.proof.recall import REQUIRED, ROWS, RecallReport, bars, recall
from llamamem.proof.recall_picture import draw_recall
from llamamem.proof.serve_run import LONGEST, ONE_THREAD, served
from llamamem.serving.client import Client

_ROWS = ",".join(f"{facts}:{gap}" for facts, gap in ROWS)


def register(app: typer.Typer) -> None:
    app.command("recall")(recall_command)


def recall_command(
    rows: Annotated[str, typer.Option(help="What to measure: FACTS:GAP with commas between, gaps in tokens.")] = _ROWS,
    episodes: Annotated[int, typer.Option(min=1, help="Fresh episodes a row.")] = 200,
    seed: Annotated[int, typer.Option(help="Of the episodes.")] = 1,
    data: Annotated[Path | None, typer.Option(help="Directory of another demo model.")] = None,
    bin_dir: Annotated[Path | None, typer.Option(help="Directory of a build made elsewhere.")] = None,
    png: Annotated[Path | None, typer.Option(help="Draw it to this file as well; needs matplotlib.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Serve the demo model and measure recall across a dropped KV cache: with its memory, with none, with another's.

    Facts are told in one conversation, its memory is saved, and each fact is asked for in a new conversation that
    starts with that memory, with none, or with the memory of another episode.

    Exit status: 0 recall is as the project promises, 1 it is not, 2 it could not be run.
    """
    asked = _rows(rows)
    files, build = demo_files(data), find_build(bin_dir=bin_dir)
    longest = max(40 * facts + gap for facts, gap in asked)
    serve = ["--model", str(files.model), "--sidecar", str(files.sidecar), "--port", "0", "--profile", "fused"]
    serve += ["--ctx-size", str(1024 * (1 + longest // 512)), "--bin-dir", str(build.bin_dir), *ONE_THREAD]
    console = Console(stderr=True)
    bar = Progress(console=console, transient=True, disable=not console.is_terminal)
    with served(serve) as server, Client(server.url, timeout=LONGEST) as client, bar:
        task = bar.add_task("episodes", total=None)
        report = recall(
            client,
            rows=asked,
            episodes=episodes,
            seed=seed,
            show=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if png is not None:
        draw_recall(report, png)
    if as_json:
        print(json.dumps(report.as_dict()))
    else:
        print_recall(report, Console(highlight=False, soft_wrap=True))
    raise typer.Exit(0 if report.ok else 1)


def print_recall(report: RecallReport, console: Console) -> None:
    table = Table(box=None, pad_edge=False)
    heads = ("facts", "gap", "questions", "with its memory", "no memory", "another's memory", "promised")
    for head in heads:
        table.add_column(head, justify="right")
    for row in report.rows:
        promised = REQUIRED.get((row.facts, row.gap))
        table.add_row(
            *(str(value) for value in (row.facts, row.gap, row.questions)),
            *(f"{value:.3f}" for value in (row.memory, row.none, row.foreign)),
            "" if promised is None else f"{promised:.2f}",
            style=None if row.ok else "red",
        )
    console.print(table)
    about = f"chance is {report.chance:.3f}; a memory has {report.memory_bytes:,} bytes"
    console.print(f"\nshare of questions answered right; {about}\n")
    console.print("facts     gap  [bold]█[/] with its memory  ░ with none")
    for line in bars(report):
        console.print(line)


def _rows(text: str) -> tuple[tuple[int, int], ...]:
    try:
        rows = tuple((int(facts), int(gap)) for facts, gap in (part.split(":") for part in text.split(",")))
    except ValueError:
        rows = ()
    if not rows or any(not 1 <= facts <= 24 or not 0 <= gap <= 3000 for facts, gap in rows):
        raise LlamamemError(f"--rows {text}: give FACTS:GAP with commas between, such as 8:64,4:500 (at most 24:3000)")
    return rows
