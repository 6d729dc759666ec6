"""`llamamem demo`: a small Gemma 4 with a live memory, from checkpoint to proof, in a few seconds."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from llamamem.cli.smoke import print_report
from llamamem.native.build import find_build
from llamamem.proof.demo import Step, demo, demo_data


def register(app: typer.Typer) -> None:
    app.command("demo")(demo_command)


def demo_command(
    data: Annotated[Path | None, typer.Option(help="Directory of another model and adapter checkpoint.")] = None,
    bin_dir: Annotated[Path | None, typer.Option(help="Directory of a build made elsewhere.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Serve a tiny random Gemma 4 with a sidecar, chat with it, and show that its memory is live.

    Exit status: 0 all of it holds, 1 something does not, 2 it could not be run.
    """
    directory, build = demo_data(data), find_build(bin_dir=bin_dir)
    console = Console(stderr=as_json, highlight=False, soft_wrap=True)
    console.print(f"llamamem demo: build {build.identity}, a random Gemma 4 of 400,000 weights: expect gibberish")

    def show(step: Step) -> None:
        mark = "[green]ok  [/]" if step.ok else "[red]FAIL[/]"
        console.print(f"{mark} {escape(step.what)}  [dim]{escape(step.seen)}[/]")

    report = demo(directory, bin_dir=build.bin_dir, show=show)
    if as_json:
        print(json.dumps({"ok": report.ok, **asdict(report)}))
    else:
        print_report(report.smoke, console)
        console.print("[green]all of it holds[/]" if report.ok else "[red]not all of it holds[/]")
    raise typer.Exit(0 if report.ok else 1)
