"""`llamamem doctor`: is everything here that a build and a run need?"""

from __future__ import annotations

import json
from dataclasses import asdict

import typer
from rich.console import Console
from rich.markup import escape


def register(app: typer.Typer) -> None:
    app.command()(doctor)


def doctor(as_json: bool = typer.Option(False, "--json", help="Print one JSON object {ok, checks}.")) -> None:
    """Look at compiler, tools, patches, build and the device of a memory, and name the next step for faults.

    The memory is that of the demo model, loaded with all layers on the GPU if there is one.

    Exit status: 0 all is well, 1 something is wrong.
    """
    from llamamem.native.doctor import examine

    found = examine()
    ok = all(finding.ok for finding in found)
    if as_json:
        typer.echo(json.dumps({"ok": ok, "checks": [asdict(finding) for finding in found]}))
    else:
        console = Console(soft_wrap=True, highlight=False)
        for finding in found:
            mark = "[green]ok  [/]" if finding.ok else "[red]FAIL[/]"
            console.print(f"{mark} {finding.id:<9} {escape(finding.detail)}")
            if not finding.ok and finding.hint:
                console.print(f"     {'':<9} next: {escape(finding.hint)}")
    if not ok:
        raise typer.Exit(1)
