"""llamamem sidecar: makes sidecar GGUFs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from llamamem.formats.sidecar import Sidecar
from llamamem.formats.sidecar_export import export_sidecar, zero_sidecar


def register(app: typer.Typer) -> None:
    """Adds `llamamem sidecar export` and `llamamem sidecar zero`."""
    group = typer.Typer(help="Make memory sidecars.", no_args_is_help=True)
    group.command()(export)
    group.command()(zero)
    app.add_typer(group, name="sidecar")


def export(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT_DIR", help="Directory with adapter, config and metadata.")
    ],
    base: Annotated[Path, typer.Option(help="Base GGUF that the sidecar is bound to.", show_default=False)],
    output: Annotated[Path, typer.Option(help="Sidecar GGUF to write.", show_default=False)],
    config: Annotated[
        str | None, typer.Option(metavar="NAME.json", help="Another config file of the directory.")
    ] = None,
    checkpoint_repo: Annotated[str, typer.Option(help="Where the checkpoint is published, for the record.")] = "",
) -> None:
    """Export an adapter checkpoint as a sidecar bound to one base GGUF."""
    size = base.stat().st_size if base.is_file() else 0
    columns = (TextColumn("hashing the base"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    quiet = not sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=quiet) as bar:
        task = bar.add_task("", total=size)
        sidecar = export_sidecar(
            checkpoint,
            base,
            output,
            config=config,
            checkpoint_repo=checkpoint_repo,
            progress=lambda n: bar.advance(task, n),
        )
    _report(sidecar)


def zero(
    file: Annotated[Path, typer.Argument(help="Sidecar GGUF.", show_default=False)],
    output: Annotated[Path, typer.Option(help="Sidecar GGUF to write.", show_default=False)],
) -> None:
    """Copy a sidecar with all its deltas zeroed: a control that must not change the base's output."""
    _report(zero_sidecar(file, output))


def _report(sidecar: Sidecar) -> None:
    layers = ",".join(str(layer.layer) for layer in sidecar.layers)
    typer.echo(
        f"{sidecar.path}: layers {layers}, heads {','.join(sidecar.delta_heads)}, rank {sidecar.rank}, "
        f"semantics {sidecar.semantics}, {len(sidecar.tensors)} tensors, {sidecar.path.stat().st_size} bytes, "
        f"base {sidecar.base_sha256}",
        err=True,
    )
