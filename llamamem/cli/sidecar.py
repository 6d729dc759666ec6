"""llamamem sidecar: makes sidecar GGUFs, shows what is in them, proves them, and gives the checkpoint back."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from llamamem.cli.base import base_file
from llamamem.formats.base import TESTED
from llamamem.formats.checkpoint.writer import materialize as write_back
from llamamem.formats.sidecar import Sidecar, read_sidecar
from llamamem.formats.sidecar.compare import Comparison
from llamamem.formats.sidecar.compare import compare as compare_sidecars
from llamamem.formats.sidecar.copy import rebind_sidecar, zero_sidecar
from llamamem.formats.sidecar.export import export_sidecar
from llamamem.formats.sidecar.inspect import Inspection, inspect_sidecar, printable, spans
from llamamem.proof.sidecar import check_sidecar_file

_MOST_FINDINGS = 8  # of a summary, which is to fit a screen

File = Annotated[Path, typer.Argument(metavar="FILE.gguf", help="Sidecar GGUF.", show_default=False)]
Output = Annotated[Path, typer.Option(metavar="FILE.gguf", help="Sidecar GGUF to write.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout.")]


class Dtype(str, Enum):
    """The type that tensors are written in."""

    keep = "keep"
    bf16 = "bf16"
    f32 = "f32"


class Rows(str, Enum):
    """How the rows of q and k lie in a base GGUF."""

    hf = "hf"
    norm = "norm"


class Format(str, Enum):
    """What the adapter of a checkpoint is written as."""

    pt = "pt"
    safetensors = "safetensors"


def register(app: typer.Typer) -> None:
    """Adds `llamamem sidecar export`, `inspect`, `validate`, `materialize`, `compare`, `rebind` and `zero`."""
    group = typer.Typer(help="Make, show, prove and take apart memory sidecars.", no_args_is_help=True)
    for verb in (export, inspect, validate, materialize, compare, rebind, zero):
        group.command()(verb)
    app.add_typer(group, name="sidecar")


def export(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="DIR", help="Checkpoint: adapter, config, metadata if any.", show_default=False)
    ],
    base: Annotated[
        Path,
        typer.Option(
            metavar="BASE.gguf", help="Base GGUF that the sidecar is bound to.", callback=base_file, show_default=False
        ),
    ],
    mmproj: Annotated[
        Path | None, typer.Option(metavar="FILE.gguf", help="Projector of the base; its hash is recorded.")
    ] = None,
    config: Annotated[
        str | None, typer.Option(metavar="FILE.json", help="Another config: a name inside DIR, or a path.")
    ] = None,
    checkpoint_repo: Annotated[
        str, typer.Option(metavar="NAME", help="Where the checkpoint is published, for the record.")
    ] = "",
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE.gguf", help="Sidecar GGUF to write; without it ./DIR.sidecar.gguf."),
    ] = None,
    manifest: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Also write size, hash, metadata and tensors as JSON.")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Type of the tensors; bf16 rounds to the nearest.")] = Dtype.keep,
    row_order: Annotated[
        Rows | None,
        typer.Option(help="Rows of the base's q and k, where its architecture does not tell: norm if permuted."),
    ] = None,
) -> None:
    """Export an adapter checkpoint as a sidecar bound to one base GGUF.

    The adapter is a .pt (nothing in its pickle can run, torch is not needed)
    or a .safetensors, RWKV-MS or delta-mem's delta rule. The same checkpoint
    and base give the same bytes.
    What a reader would refuse is refused here, before the base is hashed.

    Exit status: 0 written, 2 refused.
    """
    with _hashing(base, mmproj) as progress:
        sidecar = export_sidecar(
            checkpoint,
            base,
            output or Path(f"{checkpoint.resolve().name}.sidecar.gguf"),
            mmproj=mmproj,
            config=config,
            checkpoint_repo=checkpoint_repo,
            dtype=dtype.value,
            manifest=manifest,
            row_order=row_order.value if row_order else None,
            progress=progress,
        )
    _report(sidecar)
    if sidecar.base_arch not in TESTED:
        text = f"warning: no test is about a memory on architecture {printable(sidecar.base_arch)}: compare logits"
        typer.echo(f"{text} before you trust it (docs/porting.md), and serve it with `-- --memory-untested`", err=True)


def inspect(
    file: File,
    as_json: Json = False,
    tensors: Annotated[bool, typer.Option("--tensors", help="Also list the tensors.")] = False,
    memory_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Compare tensor by tensor with this checkpoint.")
    ] = None,
) -> None:
    """Show what a sidecar is for, which base it needs, what is in it, and whether it is intact.

    Exit status: 0 intact, 1 not the memory of --memory-dir, 2 damaged.
    """
    found = inspect_sidecar(file)
    comparison = compare_sidecars(file, memory_dir) if memory_dir and found.intact else None
    if as_json:
        more = {"comparison": comparison.as_json()} if comparison else {}
        typer.echo(json.dumps(found.as_json() | more, allow_nan=False))
    else:
        _print_summary(found)
        if tensors:
            _print_tensors(found)
        if comparison:
            typer.echo()
            _print_comparison(comparison)
    if not found.intact:
        raise typer.Exit(2)
    if comparison and not comparison.same:
        raise typer.Exit(1)


def validate(
    file: File,
    base: Annotated[
        Path | None,
        typer.Option(metavar="BASE.gguf", help="Also check that this is the base it is bound to.", callback=base_file),
    ] = None,
    runtime: Annotated[
        bool, typer.Option("--runtime", help="Also ask the runtime's own loader, and say if it disagrees.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Check every rule of the format and print all that is wrong, a line each.

    Exit status: 0 nothing, 2 something is wrong or the file cannot be read.
    """
    with _hashing(base) as progress:
        report = check_sidecar_file(file, base, runtime=runtime, progress=progress)
    if as_json:
        typer.echo(json.dumps(report.as_json()))
    else:
        for finding in report.findings:
            typer.echo(f"{file}: [{finding.reason}] {finding.message}")
        if report.disagreement:
            typer.echo(f"{file}: {report.disagreement}")
        if report.ok:
            figures = report.as_json()
            typer.echo(f"{file}: ok ({figures['tensors']} tensors, {figures['tensor_bytes']} bytes)")
    if not report.ok:
        raise typer.Exit(2)


def materialize(
    file: File,
    output: Annotated[Path, typer.Option(metavar="DIR", help="Directory to write.", show_default=False)],
    format: Annotated[Format, typer.Option(help="pt as torch.save writes it, or safetensors.")] = Format.pt,
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint's files in a non-empty DIR.")] = False,
) -> None:
    """Write the checkpoint that a sidecar was exported from: adapter, config and metadata.

    Tensors have their names, shapes and bytes again, the config its members
    in their order. torch is not needed.

    Exit status: 0 written, 2 refused.
    """
    for path in write_back(read_sidecar(file), output, format=format.value, force=force):
        typer.echo(str(path))


def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="Sidecar GGUF or checkpoint directory.", show_default=False)],
    b: Annotated[Path, typer.Argument(metavar="B", help="The other one.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Compare the memories of two files: tensors by name, shape, type, bytes and values, and the config.

    Which base a sidecar is bound to is shown, and does not count.
    Exit status: 0 the same memory, 1 different, 2 one could not be read.
    """
    comparison = compare_sidecars(a, b)
    if as_json:
        typer.echo(json.dumps(comparison.as_json(), allow_nan=False))
    else:
        _print_comparison(comparison)
    if not comparison.same:
        raise typer.Exit(1)


def rebind(
    file: File,
    base: Annotated[
        Path,
        typer.Option(
            metavar="NEW.gguf", help="Another quantisation of the same model.", callback=base_file, show_default=False
        ),
    ],
    output: Output,
) -> None:
    """Copy a sidecar and bind the copy to another file of the same model, such as another quantisation.

    Refused when the new base has another architecture, hidden size, or other
    attention in the target layers. That its weights come from the training
    that the memory belongs to is not proven: only figures are compared.
    Run `llamamem smoke` with both.

    Exit status: 0 written, 2 refused.
    """
    with _hashing(base) as progress:
        sidecar, warnings = rebind_sidecar(file, base, output, progress)
    for warning in warnings:
        typer.echo(f"warning: {warning}", err=True)
    _report(sidecar)
    typer.echo(
        "not proven: that the weights of this base are of the training that the memory belongs to; only figures were "
        f"compared. Next: llamamem smoke --model {base} --sidecar {output}; memories go along with `llamamem session "
        "rebase`",
        err=True,
    )


def zero(file: File, output: Output) -> None:
    """Copy a sidecar with all its deltas zeroed: a control that must not change the base's output.

    Exit status: 0 written, 2 refused.
    """
    _report(zero_sidecar(file, output))


def _report(sidecar: Sidecar) -> None:
    layers = spans(layer.layer for layer in sidecar.layers).replace(" ", ",")
    what = f"{sidecar.kind} of {sidecar.base_arch}" + (f", semantics {sidecar.semantics}" if sidecar.semantics else "")
    typer.echo(
        f"{sidecar.path}: {what}, layers {layers}, heads {','.join(sidecar.delta_heads) or 'none'}, "
        f"rank {sidecar.rank}, {len(sidecar.tensors)} tensors, {sidecar.path.stat().st_size} bytes, "
        f"base {sidecar.base_sha256}",
        err=True,
    )


@contextmanager
def _hashing(*files: Path | None) -> Iterator[Callable[[int], None]]:
    """A bar over the bytes of some files, on a terminal alone."""
    total = sum(file.stat().st_size for file in files if file is not None and file.is_file())
    columns = (TextColumn("hashing"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    quiet = not sys.stderr.isatty() or not total
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=quiet) as bar:
        task = bar.add_task("", total=total)
        yield lambda n: bar.advance(task, n)


def _print_summary(found: Inspection) -> None:
    typer.echo(str(found.path))
    for label, text in found.summary():
        typer.echo(f"{label:<13} {text}")
    if found.intact:
        typer.echo("intact        every check of the file passed; of its base: validate --base")
        return
    for finding in found.findings[:_MOST_FINDINGS]:
        typer.echo(f"DAMAGED       [{finding.reason}] {finding.message}")
    if len(found.findings) > _MOST_FINDINGS:
        typer.echo(
            f"DAMAGED       and {len(found.findings) - _MOST_FINDINGS} more; `llamamem sidecar validate` has all"
        )


def _print_tensors(found: Inspection) -> None:
    typer.echo()
    rows = [
        (
            printable(row.name),
            str(list(row.shape)),
            row.type,
            str(row.bytes),
            "?" if row.abs_max is None else f"{row.abs_max:.6g}",
        )
        for row in found.tensors
    ]
    _print_table(("name", "shape", "type", "bytes", "largest |value|"), rows, right=(3, 4))


def _print_comparison(comparison: Comparison) -> None:
    rows = [(d.name, str(d)) for d in comparison.tensors] + [(f"config: {d.member}", str(d)) for d in comparison.config]
    if rows:
        _print_table((f"A {comparison.a}", f"B {comparison.b}"), [(printable(a), printable(b, 200)) for a, b in rows])
    verdict = "the same memory" if comparison.same else "different"
    typer.echo(
        f"{verdict}: {comparison.compared} tensors compared, {len(comparison.tensors)} differ; "
        f"{len(comparison.config)} members of the config differ"
    )
    if None not in comparison.bases and comparison.bases[0] != comparison.bases[1]:
        typer.echo(f"bound to different bases: {comparison.bases[0]} and {comparison.bases[1]}")


def _print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> None:
    """Off a terminal a line stays a line, however long."""
    table = Table(box=None, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(Text(column), justify="right" if i in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    Console(width=None if sys.stdout.isatty() else 400).print(table)
