"""The command line: one module a verb, no logic of its own.

Exit statuses: 0 it holds, 1 the check failed, 2 it could not be run. Data goes to standard output, talk to standard
error.
"""

from __future__ import annotations

import contextlib
import importlib
import signal
import sys
import threading
from collections.abc import Collection
from typing import Any

# While all that follows is imported, Ctrl-C ends the process as it does any other: nothing is there to clean up.
_interrupt = None
if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    _interrupt = signal.signal(signal.SIGINT, signal.SIG_DFL)

import typer  # noqa: E402

from llamamem import __version__  # noqa: E402
from llamamem.cli import surroundings  # noqa: E402
from llamamem.errors import LlamamemError  # noqa: E402

__all__ = ["app", "main"]

# what a module registers stands in `llamamem --help` under its heading
VERBS = {
    "Serve": ("pull", "serve", "scale", "chat", "ps"),
    "Prove": ("health", "smoke", "eval", "trace", "demo", "recall"),
    "Runtime": ("build", "doctor", "vendor", "fixture", "parity", "reference", "train", "bench", "lab"),
    "Sidecars and memories": ("sidecar", "session", "key", "state"),
}

_MODULES = frozenset(module for modules in VERBS.values() for module in modules)

_Usage: Any = typer.BadParameter.__mro__[2]  # the root of what typer raises for a wrong command line


def app_of(verbs: Collection[str]) -> typer.Typer:
    """The command line with these of the modules in it."""
    app = typer.Typer(
        name="llamamem",
        help="Language models that remember: a memory beside an unchanged model, in a pinned and patched llama.cpp.",
        epilog="Exit status: 0 done, or it holds; 1 a check failed; 2 it could not be run. A command's help says more.",
        no_args_is_help=True,
        rich_markup_mode="markdown",  # paragraphs are filled, brackets stay
        pretty_exceptions_enable=False,
    )
    app.callback()(_main)
    for heading, modules in VERBS.items():
        for module in modules:
            if module in verbs:
                importlib.import_module(f"llamamem.cli.{module}").register(app)
        for command in app.registered_commands:
            if not isinstance(command.rich_help_panel, str):
                command.rich_help_panel = heading
        for group in app.registered_groups:
            if not isinstance(group.rich_help_panel, str):
                group.rich_help_panel = heading
    return app


def __getattr__(name: str) -> typer.Typer:
    """`app`, the whole of it, for who looks at it instead of running it."""
    if name != "app":
        raise AttributeError(name)
    return app_of(_MODULES)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"llamamem {__version__}")
        raise typer.Exit


def _main(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


def main() -> None:
    """Entry point of the `llamamem` script: an error of the user's is one line, never a traceback."""
    surroundings.prepare()
    status = _run()
    sys.exit(surroundings.flush(status))


def _run() -> int:
    try:
        # a command that is named needs no other: half of its time would go into importing them
        verb = sys.argv[1] if len(sys.argv) > 1 else ""
        app = app_of({verb} if verb in _MODULES else () if verb == "--version" else _MODULES)
        # also when it is run as a module: completion asks for that name
        status = app(prog_name="llamamem", standalone_mode=False)
        return status if isinstance(status, int) else 0
    except LlamamemError as error:
        _say(str(error))
        return error.exit_status
    except _Usage as error:
        context = getattr(error, "ctx", None)
        if not str(error.format_message()).strip() or type(error).__name__ == "NoArgsIsHelpError":
            error.show()  # a group without a command: its help
            return error.exit_code
        # one line, and no box around it: what is written to a pipe is read line by line
        said = " ".join(error.format_message().split())
        command = context.command_path if context is not None else "llamamem"
        _say(f"{said.rstrip('.?')}; `{command} --help` says what there is")
        return error.exit_code
    except typer.Abort:
        _say("nothing was done: the question was not answered")
        return 1
    except KeyboardInterrupt:
        return 130  # as a shell has it for Ctrl-C
    except UnicodeError as error:
        # before its own message could name it: a name that cannot be written down, in JSON for one
        _say(f"a name is not valid in this encoding ({error}); rename the file, or use a UTF-8 locale")
        return 2
    except OSError as error:
        if surroundings.is_nowhere():
            _say("the directory that this runs in is gone; change to another")
            return 2
        if (lost := surroundings.lost_output(error)) is None:
            raise
        return lost


def _say(line: str) -> None:
    with contextlib.suppress(OSError):
        print(f"llamamem: error: {line}", file=sys.stderr, flush=True)


if _interrupt is not None:
    signal.signal(signal.SIGINT, _interrupt)
