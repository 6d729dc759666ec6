"""`llamamem build`: compile the native runtime."""

from __future__ import annotations

import json
from dataclasses import asdict

import typer

from llamamem.native import build as native


def register(app: typer.Typer) -> None:
    app.command()(build)


def build(
    backend: str = typer.Option("cpu", help="cpu or cuda."),
    jobs: int = typer.Option(None, "--jobs", "-j", min=1, help="Compile so many files at once [default: one a core]."),
    arch: str = typer.Option(
        None, help="CUDA architectures, native, 90 or '80;90' [default: the GPUs that are here, else 80 and 90]."
    ),
    define: list[str] = typer.Option(
        [], "--define", "-D", metavar="NAME=VALUE", help="Passed to CMake; may be repeated."
    ),
    tests: bool = typer.Option(False, "--tests", help="Build the native tests too."),
    force: bool = typer.Option(False, "--force", help="Start from nothing."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object about the build."),
) -> None:
    """Build the native runtime, or say at once that it is built. Prints the build's directory.

    Exit status: 0 it is built, 2 it could not be built.
    """
    made = native.build(backend, jobs=jobs, arch=arch, defines=define, tests=tests, force=force)
    if as_json:
        typer.echo(json.dumps({name: str(value) for name, value in asdict(made).items()}))
    else:
        typer.echo(made.root)
