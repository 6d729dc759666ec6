"""llamamem fixture: runs layer fixtures through the oracle and the compiled op."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from llamamem.proof.fixtures import FixtureReport, check_fixtures


class Engine(str, Enum):
    """Which implementation runs the layer."""

    numpy = "numpy"
    native = "native"
    torch = "torch"
    both = "both"


def register(app: typer.Typer) -> None:
    """Adds `llamamem fixture check`."""
    group = typer.Typer(help="Check the memory layer against recorded fixtures.", no_args_is_help=True)
    group.command()(check)
    group.callback()(lambda: None)  # keeps `check` a subcommand while it is the only one
    app.add_typer(group, name="fixture")


def check(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Layer fixtures, .npz or .json.", show_default=False)
    ],
    engine: Annotated[
        Engine, typer.Option(help="The NumPy oracle, the compiled op, both, or the PyTorch reference.")
    ] = Engine.numpy,
    atol: Annotated[float, typer.Option(min=0.0, help="Largest absolute difference that passes.")] = 1e-5,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout.")] = False,
) -> None:
    """Run layer fixtures and print the largest absolute difference of each tensor.

    Exit status: 0 all within --atol, 1 a difference is larger or not a number, 2 a file could not be run.
    """
    engines = ["numpy", "native"] if engine is Engine.both else [engine.value]
    reports = check_fixtures(files, engines, atol)
    ok = all(report.ok for report in reports)
    if as_json:
        worst = {name: max((r for r in reports if r.engine == name), key=_badness) for name in engines}
        summary = {name: report.as_json()["max_abs_diff"] for name, report in worst.items()}
        files_json = [report.as_json() for report in reports]
        typer.echo(json.dumps({"ok": ok, "atol": atol, "max_abs_diff": summary, "files": files_json}, allow_nan=False))
    else:
        for report in reports:
            typer.echo(_lines(report))
        failed = sum(not report.ok for report in reports)
        worst_of_all = max(reports, key=_badness)
        typer.echo(
            f"{len(reports) - failed} of {len(reports)} within {atol:g}; "
            f"largest difference {worst_of_all.max_abs_diff:.2e} ({worst_of_all.engine}, {worst_of_all.path.name})"
        )
    if not ok:
        raise typer.Exit(1)


def _badness(report: FixtureReport) -> float:
    diff = report.max_abs_diff
    return diff if diff == diff else float("inf")


def _lines(report: FixtureReport) -> str:
    verdict = "ok  " if report.ok else "FAIL"
    head = f"{verdict} {report.max_abs_diff:.2e}  {report.engine:6}  {report.path}"
    cells = [f"{name} {diff:.2e}{'' if diff <= report.atol else ' <- over'}" for name, diff in report.tensors.items()]
    rows = [cells[i : i + 6] for i in range(0, len(cells), 6)]
    return "\n".join([head, *("       " + "  ".join(row) for row in rows)])
