"""llamamem fixture: runs recorded fixtures, of one layer or of a whole model, through every implementation."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from llamamem.cli.sidecar import Rows
from llamamem.proof.fixtures import FixtureReport, check_fixtures
from llamamem.proof.model_fixtures import LOGITS, STATES, CaseReport, check_model_fixture


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
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="PATH...", help="Layer fixtures, .npz or .json, or folders of whole models.", show_default=False
        ),
    ],
    engine: Annotated[
        Engine | None,
        typer.Option(
            help="numpy, the oracle (what a layer is run through unless told otherwise); torch, the reference (a folder"
            " likewise); native, the runtime; both: the first of these that there is, and native."
        ),
    ] = None,
    atol: Annotated[
        float | None,
        typer.Option(min=0.0, help=f"Largest absolute difference that passes: 1e-5 of a layer, {LOGITS:g} of logits."),
    ] = None,
    atol_states: Annotated[
        float, typer.Option(min=0.0, help="The same of the memory's values, of a whole model.")
    ] = STATES,
    row_order: Annotated[
        Rows | None, typer.Option(help="As of `sidecar export`, for whole models of an architecture that it asks of.")
    ] = None,
    bin_dir: Annotated[Path | None, typer.Option(help="A build made elsewhere, for whole models.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout.")] = False,
) -> None:
    """Run fixtures and print the largest absolute difference of each tensor.

    A folder is a whole model: the base in Hugging Face's form and as model*.gguf, an adapter's checkpoint, and
    logits.npz. Each of its cases is run: without a memory, with it in one pass and token by token, on the memory of
    another text with the KV cache dropped, and frozen. The runtime is the build with the exact GELU, with an F32 KV
    cache, at microbatches of 1, 7 and 512.

    Exit status: 0 all within the bounds, 1 a difference is larger or not a number, 2 something could not be run.
    """
    files, folders = [path for path in paths if not path.is_dir()], [path for path in paths if path.is_dir()]
    reports = check_fixtures(files, _engines(engine, Engine.numpy), 1e-5 if atol is None else atol)
    if not as_json:
        for report in reports:
            typer.echo(_lines(report))
    cases = [
        case
        for folder in folders
        for name in _engines(engine, Engine.torch)
        for case in check_model_fixture(
            folder,
            name,
            atol=LOGITS if atol is None else atol,
            atol_states=atol_states,
            row_order=row_order.value if row_order else None,
            bin_dir=bin_dir,
            show=(lambda case: None) if as_json else show_case,
        )
    ]
    ok = all(report.ok for report in reports) and all(case.ok for case in cases)
    if as_json:
        _print_json(ok, 1e-5 if atol is None else atol, reports, cases)
    else:
        summarize(reports, cases)
    if not ok:
        raise typer.Exit(1)


def _engines(engine: Engine | None, default: Engine) -> list[str]:
    if engine is Engine.both:
        return [default.value, Engine.native.value]
    return [(engine or default).value]


def show_case(case: CaseReport) -> None:
    """One line, as soon as it is known."""
    verdict = "ok  " if case.ok else "FAIL"
    states = "" if case.states is None else f"  states {case.states:.2e}"
    counters = "" if case.counters_equal else "  other counters"
    more = f"  {case.argmax_differences} other argmax" if case.argmax_differences else ""
    typer.echo(
        f"{verdict} logits {case.logits:.2e}{states}{counters}{more}  {case.engine:16}  {case.fixture} {case.case}"
    )


def summarize(reports: list[FixtureReport], cases: list[CaseReport]) -> None:
    if reports:
        failed = sum(not report.ok for report in reports)
        worst = max(reports, key=_badness)
        typer.echo(
            f"{len(reports) - failed} of {len(reports)} within {worst.atol:g}; "
            f"largest difference {worst.max_abs_diff:.2e} ({worst.engine}, {worst.path.name})"
        )
    if cases:
        failed = sum(not case.ok for case in cases)
        logits = max(cases, key=lambda case: _worst(case.logits))
        states = max((_worst(case.states) for case in cases if case.states is not None), default=0.0)
        typer.echo(
            f"{len(cases) - failed} of {len(cases)} within {logits.atol:g} and {logits.atol_states:g}; largest "
            f"difference of logits {logits.logits:.2e} ({logits.case} of {logits.fixture.name}), of states {states:.2e}"
        )


def _print_json(ok: bool, atol: float, reports: list[FixtureReport], cases: list[CaseReport]) -> None:
    found: dict[str, object] = {"ok": ok}
    if reports:
        engines = dict.fromkeys(report.engine for report in reports)
        worst = {name: max((r for r in reports if r.engine == name), key=_badness) for name in engines}
        summary = {name: report.as_json()["max_abs_diff"] for name, report in worst.items()}
        found |= {"atol": atol, "max_abs_diff": summary, "files": [report.as_json() for report in reports]}
    if cases:
        bounds = {"atol": cases[0].atol, "atol_states": cases[0].atol_states}
        found["models"] = {**bounds, "cases": [case.as_json() for case in cases]}
    typer.echo(json.dumps(found, allow_nan=False))


def _badness(report: FixtureReport) -> float:
    return _worst(report.max_abs_diff)


def _worst(diff: float) -> float:
    return diff if diff == diff else float("inf")


def _lines(report: FixtureReport) -> str:
    verdict = "ok  " if report.ok else "FAIL"
    head = f"{verdict} {report.max_abs_diff:.2e}  {report.engine:6}  {report.path}"
    cells = [f"{name} {diff:.2e}{'' if diff <= report.atol else ' <- over'}" for name, diff in report.tensors.items()]
    rows = [cells[i : i + 6] for i in range(0, len(cells), 6)]
    return "\n".join([head, *("       " + "  ".join(row) for row in rows)])
