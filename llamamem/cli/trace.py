"""`llamamem trace`: a reference trace against a running server."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from llamamem.cli.session import ApiKey, Json, Run

Url = Annotated[str | None, typer.Option(help="A server that `llamamem serve` did not start.")]


def register(app: typer.Typer) -> None:
    group = typer.Typer(help="Reference traces: what an independent runtime answered.", no_args_is_help=True)
    group.callback()(lambda: None)  # a group of one command is still a group
    group.command("compare")(compare)
    app.add_typer(group, name="trace")


def compare(
    trace: Annotated[Path, typer.Argument(metavar="TRACE.json", help="Schema delta_mem_rwkv_ms_reference_trace.v1.")],
    slot: Annotated[int, typer.Option(min=0, help="Slot to ask in; its memory is left alone.")] = 0,
    erase: Annotated[bool, typer.Option("--erase", help="Erase the slot first; not needed any more.")] = False,
    run: Run = None,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """Ask a running server what a trace was asked, and compare the answers.

    The text must be the same, and so must the token ids where the trace has them.

    Exit status: 0 they are equal, 1 they differ, 2 it could not be run.
    """
    from llamamem.formats.trace import read_trace
    from llamamem.proof.trace import compare_trace
    from llamamem.serving.target import open_target

    reference = read_trace(trace)
    client, _ = open_target(run, url, api_key)
    with client:
        if erase:
            client.erase_slot(slot)
        found = compare_trace(client, reference, slot=slot)
    if as_json:
        print(json.dumps({**asdict(found), "detail": found.detail}))
    else:
        print(found.detail)
        if not found.ok:
            print(f"expected  {found.expected!r}\ngot       {found.got!r}")
            typer.echo(f"llamamem: {found.hint}", err=True)
    raise typer.Exit(0 if found.ok else 1)
