"""`llamamem ps`, `logs` and `stop`: the servers that `llamamem serve` started, by name."""

from __future__ import annotations

import json
import sys
import time
from typing import Annotated

import typer

from llamamem.errors import LlamamemError
from llamamem.formats.run import RunRecord
from llamamem.serving.runs import Shown, all_runs, find_run, last_run, live_runs, shown_state, stop_run

_FILE_NAME = 8  # characters of one that still say something
KILLED = 3  # exit status, as that of `llamamem serve`

Name = Annotated[str | None, typer.Argument(metavar="[NAME]", help="Which run, when several run: its name or run id.")]
Run = Annotated[str | None, typer.Option(metavar="NAME", help="The same.")]


def register(app: typer.Typer) -> None:
    app.command("ps")(ps)
    app.command("logs")(logs)
    app.command("stop")(stop)


def ps(
    every: Annotated[bool, typer.Option("--all", "-a", help="Those that are over, too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List the servers that run. Exit status: 0, also when there is none."""
    records = all_runs() if every else live_runs(starting=True)
    shown = [(record, shown_state(record)) for record in records]
    if as_json:
        print(json.dumps({"runs": [{**record.model_dump(), "state": state} for record, state in shown]}))
    elif shown:
        _print_table(shown)
    else:
        print("no server runs; start one with `llamamem serve`", file=sys.stderr)


def logs(
    name: Name = None,
    run: Run = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run is over, or Ctrl-C.")] = False,
    lines: Annotated[int | None, typer.Option("--lines", "-n", min=0, help="Only the last lines.")] = None,
) -> None:
    """Print the log of a run; of one that is over when none runs, or when it is named.

    Exit status: 0, or 2 when there is no such run or no log.
    """
    from llamamem.serving.logs import read_log

    record = last_run(_one(name, run))
    try:
        for text in read_log(record, follow=follow, lines=lines):
            sys.stdout.write(text)
            sys.stdout.flush()
    except KeyboardInterrupt:
        raise typer.Exit from None


def stop(
    name: Name = None,
    run: Run = None,
    every: Annotated[bool, typer.Option("--all", "-a", help="All that run.")] = False,
    grace: Annotated[float, typer.Option(min=0, help="Seconds until it is killed.")] = 15.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Stop a server in order: its launcher is asked, or the server itself when that is gone.

    Exit status: 0 stopped, 2 there is no such server, 3 it had to be killed.
    """
    if every and _one(name, run) is not None:
        raise LlamamemError("--all and a name: give one of them")
    records = live_runs(starting=True) if every else [find_run(_one(name, run), starting=True)]
    endings = [(record, stop_run(record, grace)) for record in records]
    if as_json:
        print(json.dumps({"runs": [{"run_id": r.run_id, "name": r.name, "ending": ending} for r, ending in endings]}))
    else:
        for record, ending in endings:
            print(f"llamamem: {record.name} {'had ended' if ending == 'gone' else f'was {ending}'}", file=sys.stderr)
    if any(ending == "killed" for _, ending in endings):
        raise typer.Exit(KILLED)


def _one(name: str | None, run: str | None) -> str | None:
    if name is not None and run is not None:
        raise LlamamemError("NAME and --run both name a run; give one of them")
    return name or run


def _print_table(shown: list[tuple[RunRecord, Shown]]) -> None:
    from pathlib import Path

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

    heads = ("name", "state", "profile", "url", "pid", "for", "model", "sidecar")
    rows = []
    for record, state in shown:
        sidecar = Path(record.sidecar).name if record.sidecar else "-"
        age = _age((record.ended or time.time()) - record.started) if state != "lost" else "-"
        model = Path(record.model).name
        rows.append(
            (record.name, state, record.profile, record.gateway or record.url, str(record.pid), age, model, sidecar)
        )
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 10_000  # one line a run, for whoever reads on
    # part of a URL is none: what is short of room are the files' names, and where none is left for them they stay out
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    n = len(heads) if sum(widths[:-2]) + 2 * len(heads) + 2 * _FILE_NAME <= console.width else len(heads) - 2
    columns = (
        Column(head, no_wrap=True, min_width=width if i < len(heads) - 2 else None)
        for i, (head, width) in enumerate(zip(heads[:n], widths, strict=False))
    )
    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*map(escape, row[:n]))
    console.print(table)


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f}{unit}"
    return f"{max(seconds, 0):.0f}s"
