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

# what a module registers stands in `llamamem --help` under its heading
VERBS = {
    "Serve": ("serve", "chat", "ps"),
    "Prove": ("health", "smoke", "eval", "trace", "demo", "recall"),
    "Runtime": ("build", "doctor", "vendor", "fixture", "parity", "reference", "train", "bench", "lab"),
    "Sidecars and memories": ("sidecar", "session", "state"),
}

app = typer.Typer(
    name="llamamem",
    help="Gemma 4 with an RWKV-MS memory beside it, inside a pinned and patched llama.cpp.",
    epilog="Exit status: 0 done, or it holds; 1 a check failed; 2 it could not be run. A command's help says more.",
    no_args_is_help=True,
    rich_markup_mode="markdown",  # paragraphs are filled, brackets stay
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


for _heading, _verbs in VERBS.items():
    for _verb in _verbs:
        importlib.import_module(f"llamamem.cli.{_verb}").register(app)
    for _command in app.registered_commands:
        if not isinstance(_command.rich_help_panel, str):
            _command.rich_help_panel = _heading
    for _group in app.registered_groups:
        if not isinstance(_group.rich_help_panel, str):
            _group.rich_help_panel = _heading


def main() -> None:
    """Entry point of the `llamamem` script: an error of the user's is one line, never a traceback."""
    try:
        app(prog_name="llamamem")  # also when it is run as a module: completion asks for that name
    except LlamamemError as error:
        print(f"llamamem: error: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except BrokenPipeError:  # `llamamem ... | head`: nobody reads on, and flushing at exit must not say so
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
