"""The command line: one module a verb, no logic of its own.

Exit statuses: 0 it holds, 1 the check failed, 2 it could not be run. Data goes to standard output, talk to standard
error.
"""

from __future__ import annotations

import importlib
import os
import sys

import typer

from llamamem import __version__
from llamamem.errors import LlamamemError

__all__ = ["app", "main"]

VERBS = (
    *("build", "vendor", "serve", "smoke", "demo", "sidecar", "state", "session"),
    *("fixture", "parity", "bench", "doctor"),
)

app = typer.Typer(
    name="llamamem",
    help="Gemma 4 with an RWKV-MS memory beside it, inside a pinned and patched llama.cpp.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"llamamem {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


for _verb in VERBS:
    importlib.import_module(f"llamamem.cli.{_verb}").register(app)


def main() -> None:
    """Entry point of the `llamamem` script: an error of the user's is one line, never a traceback."""
    try:
        app()
    except LlamamemError as error:
        print(f"llamamem: error: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except BrokenPipeError:  # `llamamem ... | head`: nobody reads on, and flushing at exit must not say so
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
