"""`llamamem key`: who may use a gateway, and whose sessions they see."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from llamamem.cli.session import Json, Store, open_given_store
from llamamem.sessions import Key


def register(app: typer.Typer) -> None:
    group = typer.Typer(
        help="Keys of a gateway's API: made, listed, taken back. Each opens the sessions of one namespace.",
        no_args_is_help=True,
    )
    group.command("add")(add)
    group.command("list")(list_keys)
    group.command("rm")(remove)
    app.add_typer(group, name="key")


def add(
    namespace: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help='Whose sessions it opens; one of its own unless given, "" for those made without a key.',
        ),
    ] = None,
    label: Annotated[str, typer.Option(metavar="TEXT", help="What the list calls it.")] = "",
    operator: Annotated[
        bool, typer.Option("--operator", help="May use the server's slots too, and change what it serves.")
    ] = False,
    store: Store = None,
    as_json: Json = False,
) -> None:
    """Make a key, and print it: it is kept nowhere, only its hash is. Gateways take it within two seconds.

    Exit status: 0 made, 2 it could not be.
    """
    from llamamem.gateway.access import new_key

    told, key = new_key(namespace, label=label, operator=operator)
    open_given_store(store).add_key(key)
    if as_json:
        print(json.dumps({"key": told, **_shown(key)}))
        return
    print(told)
    typer.echo(f"key {key.id} opens the sessions of {key.namespace!r}; it is shown this once", err=True)


def list_keys(store: Store = None, as_json: Json = False) -> None:
    """List the keys: what each opens, never the key.

    Exit status: 0 listed, 2 the store cannot be read.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    keys = sorted(open_given_store(store).keys(), key=lambda key: key.created)
    if as_json:
        print(json.dumps({"keys": [_shown(key) for key in keys]}))
    elif keys:
        table = Table("id", "namespace", "label", "operator", "created (UTC)", box=None, pad_edge=False)
        for key in keys:
            operator = "yes" if key.operator else ""
            table.add_row(*map(escape, (key.id, key.namespace, key.label, operator, f"{key.created:%Y-%m-%d %H:%M}")))
        console = Console(highlight=False)
        if not console.is_terminal:
            console.width = 10_000
        console.print(table)


def remove(
    ids: Annotated[list[str], typer.Argument(metavar="ID...", help="As the list has them.", show_default=False)],
    store: Store = None,
) -> None:
    """Take keys back. Gateways refuse them within two seconds; the sessions stay.

    Exit status: 0 done, 2 it could not be done.
    """
    opened = open_given_store(store)
    for id in ids:
        key = opened.remove_key(id)
        typer.echo(f"removed {id}, which opened {key.namespace!r}", err=True)


def _shown(key: Key) -> dict[str, Any]:
    return key.model_dump(mode="json", exclude={"sha256"})
