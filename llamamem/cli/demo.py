"""`llamamem demo`: a small Gemma 4 remembers across a restart, and does not without its memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from llamamem.cli.recall import print_recall
from llamamem.formats.demo_files import demo_files
from llamamem.native.build import find_build
from llamamem.proof.demo import DemoReport, Step, demo
from llamamem.proof.recall_picture import draw_recall


def register(app: typer.Typer) -> None:
    app.command("demo")(demo_command)


def demo_command(
    data: Annotated[Path | None, typer.Option(help="Directory of another demo model.")] = None,
    bin_dir: Annotated[Path | None, typer.Option(help="Directory of a build made elsewhere.")] = None,
    episodes: Annotated[int, typer.Option(min=2, help="Fresh episodes a row of the table.")] = 10,
    png: Annotated[Path | None, typer.Option(help="Draw the table to this file as well; needs matplotlib.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Tell a small Gemma 4 some facts, restart its server, and ask for them: with its memory, and without.

    Exit status: 0 all of it holds, 1 something does not, 2 it could not be run.
    """
    files, build = demo_files(data), find_build(bin_dir=bin_dir)
    console = Console(stderr=as_json, highlight=False, soft_wrap=True)
    console.print("[bold]A Gemma 4 of 0.8M parameters that knows one small language, with a memory beside it[/]\n")

    def show(step: Step) -> None:
        mark = "[green]ok  [/]" if step.ok else "[red]FAIL[/]"
        console.print(f"{mark} {escape(step.what)}: [dim]{escape(step.seen)}[/]")

    def say(who: str, text: str) -> None:
        console.print(f"       [bold]{'you' if who == 'user' else 'model':>5}[/]  {escape(text)}")

    with Progress(console=Console(stderr=True), transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("episodes for the table", total=None, visible=False)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, visible=True)

        report = demo(files, bin_dir=build.bin_dir, episodes=episodes, show=show, say=say, progress=progress)
    if png is not None:
        draw_recall(report.recall, png)
    if as_json:
        print(json.dumps(report.as_dict()))
    else:
        _print_answers(report, console)
        console.print(f"The same over {episodes} fresh episodes a row, on the same server:\n")
        print_recall(report.recall, console)
        console.print("\n[green]all of it holds[/]" if report.ok else "\n[red]not all of it holds[/]")
    raise typer.Exit(0 if report.ok else 1)


def _print_answers(report: DemoReport, console: Console) -> None:
    table = Table(box=None, pad_edge=False, title="\nConversation two, on the new server", title_justify="left")
    for head in ("asked", "no memory", "somebody else's memory", "memory of conversation one"):
        table.add_column(head)
    for asked in report.asked:

        def shown(surname: str | None, right: str = asked.surname, name: str = asked.name) -> str:
            text = f"that is {name} {surname}" if surname else "no answer"
            return f"[green]{text}[/]" if surname == right else f"[red]{text}[/]"

        table.add_row(f"who is {asked.name}?", shown(asked.none), shown(asked.foreign), shown(asked.memory))
    console.print(table)
    console.print()
