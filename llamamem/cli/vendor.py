"""`llamamem vendor fetch|apply|refresh|verify`: the pinned llama.cpp and the patches over it."""

from __future__ import annotations

import typer

from llamamem.native import vendor


def register(app: typer.Typer) -> None:
    group = typer.Typer(help="The pinned llama.cpp and the patches over it (for maintainers).", no_args_is_help=True)
    for command in (fetch, apply, refresh, verify):
        group.command()(command)
    app.add_typer(group, name="vendor")


def fetch() -> None:
    """Download the pinned sdist by hash and unpack llama.cpp from it, unless it is there.

    Exit status: 0 done, 2 it could not be done.
    """
    typer.echo(vendor.fetch())


def apply() -> None:
    """Bring the tree to the pin and the patch series; refuse when that would lose local edits.

    Exit status: 0 done, 2 it could not be done.
    """
    if not vendor.apply():
        typer.echo("llamamem: up to date", err=True)
    typer.echo(vendor.tree_path())


def refresh(
    into: str = typer.Option(None, metavar="PATCH", help="The patch that uncommitted edits belong to, as in 0003."),
) -> None:
    """Write the commits of the tree back to patches/ and the lock file.

    Exit status: 0 done, 2 it could not be done.
    """
    if not vendor.refresh(into=into):
        typer.echo("llamamem: nothing changed", err=True)


def verify() -> None:
    """Check that pin + series give the recorded tree and that the files are that tree; name what differs.

    Exit status: 0 they are, 1 something differs, 2 it could not be checked.
    """
    problems = vendor.verify()
    for problem in problems:
        typer.echo(problem)
    if problems:
        raise typer.Exit(1)
    typer.echo("verified: pristine tree + series = recorded tree = the files; applying again changes nothing")
