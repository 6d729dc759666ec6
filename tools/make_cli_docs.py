"""Writes docs/cli.md: the help of every command, from the commands themselves. `--check` only compares.

Exit status: 0 written, or current; 1 not current; 2 the file cannot be read or written.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import typer
from typer.models import ArgumentInfo, OptionInfo, ParameterInfo

from llamamem.cli import VERBS, app

DOCS = Path(__file__).resolve().parents[1] / "docs" / "cli.md"
HEAD = """# The commands

Made by `tools/make_cli_docs.py` from the help of the commands; a test holds it current. What `--json` prints is in
`docs/json.md`.

Data goes to standard output and talk to standard error. `NO_COLOR` is honoured, and nothing is drawn off a terminal.
Exit status: 0 done, or it holds; 1 a check failed; 2 it could not be run, with one line that says why and what to do.
`llamamem --install-completion` teaches your shell the commands, their options, and the names of runs and sessions.
"""
NAMES = {Path: "PATH", str: "TEXT", int: "N", float: "X"}
Command = tuple[str, Callable[..., Any], str]  # "llamamem session save", what it calls, its heading


def commands(group: typer.Typer = app, path: str = "llamamem", heading: str = "") -> Iterator[Command]:
    """Every command that does something, in the order of the help."""
    for command in group.registered_commands:
        assert command.callback is not None
        name = command.name or command.callback.__name__
        yield f"{path} {name}", command.callback, heading or str(command.rich_help_panel)
    for part in group.registered_groups:
        assert part.typer_instance is not None
        yield from commands(part.typer_instance, f"{path} {part.name}", heading or str(part.rich_help_panel))


def parameters(callback: Callable[..., Any]) -> Iterator[tuple[inspect.Parameter, Any, ParameterInfo]]:
    """Each with its bare type and what typer knows of it."""
    for parameter in inspect.signature(callback, eval_str=True).parameters.values():
        kind, info = parameter.annotation, parameter.default
        if get_origin(kind) is Annotated:
            kind, info = get_args(kind)[0], next(i for i in get_args(kind) if isinstance(i, ParameterInfo))
        if isinstance(info, ParameterInfo):
            yield parameter, _bare(kind), info


def document() -> str:
    texts, found = [HEAD], list(commands())
    for heading in VERBS:
        texts.append(f"\n## {heading}\n")
        texts += [_command(path, callback) for path, callback, under in found if under == heading]
    return "".join(texts)


def _command(path: str, callback: Callable[..., Any]) -> str:
    usage, rows = [path], []
    for parameter, kind, info in parameters(callback):
        if isinstance(info, ArgumentInfo):
            name = info.metavar or parameter.name.upper()
            required = parameter.default in (inspect.Parameter.empty, ...)
            usage.append(name if required else f"[{name.strip('[]')}]")
            rows.append((name, str(info.help)))
        else:
            assert isinstance(info, OptionInfo)
            rows.append((_option(parameter, kind, info), _says(parameter, info)))
    usage.insert(1, "[OPTIONS]")
    lines = [f"\n### {path}\n", f"```\n{' '.join(usage)}\n```\n", f"{inspect.getdoc(callback)}\n"]
    if rows:
        table = "".join(f"| `{name}` | {text} |\n" for name, text in ((_cell(n), _cell(t)) for n, t in rows))
        lines.append(f"| | what it is |\n| --- | --- |\n{table}")
    return "\n".join(lines)


def _option(parameter: inspect.Parameter, kind: Any, info: OptionInfo) -> str:
    # what stands first in an Annotated one is its "default"
    declared = [str(name) for name in (info.default, *(info.param_decls or ())) if str(name).startswith("-")]
    names = declared or ["--" + parameter.name.replace("_", "-")]
    shown = ", ".join(sorted(names, key=len))
    if kind is bool:
        return shown
    if isinstance(kind, type) and issubclass(kind, Enum):
        return f"{shown} {'|'.join(str(choice.value) for choice in kind)}"
    return f"{shown} {info.metavar or NAMES[kind]}"


def _says(parameter: inspect.Parameter, info: OptionInfo) -> str:
    default = info.default if isinstance(parameter.default, ParameterInfo) else parameter.default
    said = [str(info.help)]
    if default in (inspect.Parameter.empty, ...):
        said.append("Required.")
    elif default not in (None, False, True, []):
        said.append(f"Default: `{default.value if isinstance(default, Enum) else default}`.")
    if info.envvar:
        said.append(f"Environment: `{info.envvar}`.")
    return " ".join(said)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _bare(kind: Any) -> Any:
    """Without `| None`, and one of a list."""
    if get_origin(kind) in (Union, UnionType):
        kind = next(part for part in get_args(kind) if part is not type(None))
    return get_args(kind)[0] if get_origin(kind) is list else kind


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    check = parser.parse_args().check
    text = document()
    try:
        if not check:
            DOCS.write_text(text, encoding="utf-8")
        elif DOCS.read_text(encoding="utf-8") != text:
            print(f"{DOCS.name} is not current; run tools/make_cli_docs.py", file=sys.stderr)
            return 1
    except OSError as e:
        print(f"{DOCS}: {e.strerror}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
