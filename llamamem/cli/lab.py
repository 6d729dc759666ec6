"""`llamamem lab`: what a recurrent state can hold, measured. `mqar` needs PyTorch."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from llamamem.errors import LlamamemError
from llamamem.lab import dla as dla_lab
from llamamem.lab import dla_memory, dla_report
from llamamem.lab.dla_blocks import TAU
from llamamem.lab.dla_check import check as check_figures
from llamamem.lab.dla_data import WIDTH, Setting
from llamamem.lab.mqar_plan import Run
from llamamem.lab.mqar_presets import PRESETS
from llamamem.lab.mqar_report import Report
from llamamem.lab.mqar_results import Line, read_lines
from llamamem.reference.require import require_torch


class Preset(str, Enum):
    cpu = "cpu"
    published = "published"
    smoke = "smoke"


class Device(str, Enum):
    cpu = "cpu"
    cuda = "cuda"


class Gates(str, Enum):
    sharp = "sharp"
    start = "start"


_SIZES = "NEEDLES:FILLER:K, commas between"
_WIDE = 240  # columns: a row is a line, also where the terminal is narrower and wraps it
_JSON = typer.Option("--json", help="Print one JSON object.")


def register(app: typer.Typer) -> None:
    """Adds `llamamem lab dla`, `memory` and `mqar`."""
    group = typer.Typer(help="What a recurrent state can hold, measured.", no_args_is_help=True)
    for verb in (dla, memory, mqar):
        group.command()(verb)
    app.add_typer(group, name="lab")


def dla(
    hola: Annotated[
        bool, typer.Option("--hola", help="The appendix too: a cache of tokens beside the states.")
    ] = False,
    check: Annotated[bool, typer.Option("--check", help="Compare with the published figures.")] = False,
    output: Annotated[Path | None, typer.Option(help="Directory for the report, the figures and the picture.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Sequences a row.")] = 5,
    sizes: Annotated[str | None, typer.Option(help=f"Needles instead of the published ones: {_SIZES}.")] = None,
    width: Annotated[int, typer.Option(min=2, help="Numbers of a key and of a value.")] = WIDTH,
    tau: Annotated[float, typer.Option(min=0, help="How new a token must be to begin a block.")] = TAU,
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Measure what blocks of tokens, each with a state of its own, can recall; no training, a few seconds.

    Boundaries where something new begins (DLA) against equal ones, a sum against RWKV-7's update, and what the
    published verdicts leave out. docs/lab.md says what each figure is.

    Exit status: 0 measured, and with --check as published; 1 it is not as published; 2 it could not be run.
    """
    plan = dla_lab.Plan(seeds=seeds, width=width, tau=tau)
    if sizes is not None:
        plan = replace(plan, recall=_settings(sizes), states=_settings(sizes))
    if check and plan != dla_lab.Plan():
        raise LlamamemError(
            "--check compares with the published figures; leave out --seeds, --sizes, --width and --tau"
        )
    if output is not None:
        dla_report.save(output, {})  # what cannot be written to is found out before, not after
    results = dla_lab.run(plan, hola=hola)
    findings = check_figures(results) if check else None
    if output is not None:
        dla_report.write(results, findings, output)
        _drawn(output / "dla.png", lambda path: _draw_dla(results, path))
    ok = findings is None or all(finding.ok for finding in findings)
    if as_json:
        found = [{**vars(finding), "ok": finding.ok} for finding in findings or ()]
        print(json.dumps({"ok": ok, **dla_report.summary(results), "check": found}))
    else:
        console = Console(highlight=False, soft_wrap=True, width=_WIDE)
        for table in dla_report.tables(results):
            table.show(console)
        for title, lines in (
            ("Verdicts", dla_report.verdict_lines(results)),
            ("Beside them", dla_report.remarks(results)),
        ):
            console.print(f"[bold]{title}[/]\n")
            console.print("\n".join(lines) + "\n", markup=False)
        for finding in findings or ():
            console.print(dla_report.finding_line(finding), style=None if finding.ok else "red", markup=False)
    raise typer.Exit(0 if ok else 1)


def memory(
    ranks: Annotated[str, typer.Option(help="Of the states, with commas between.")] = "8,16",
    states: Annotated[str, typer.Option(help="How many, likewise.")] = "1,2,4,8",
    chunks: Annotated[str, typer.Option(help="Tokens before the next state is written to, likewise.")] = "16,32,1024",
    needles: Annotated[int, typer.Option(min=1, help="Pairs to be recalled.")] = 8,
    fill: Annotated[int, typer.Option(min=2, help="Tokens of filler after each, about.")] = 12,
    gates: Annotated[
        Gates, typer.Option(help="sharp: a needle is written, filler hardly; start: all alike.")
    ] = Gates.sharp,
    seeds: Annotated[int, typer.Option(min=1, help="Sequences a row.")] = 10,
    output: Annotated[Path | None, typer.Option(help="Directory for memory.md and memory_trials.jsonl.")] = None,
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Measure what the memory as shipped recalls, by its rank, states and chunk, and by its rule.

    Keys and values are drawn and gates are given, nothing is trained: what is seen is what the states hold and what the
    memory's own read finds in them.

    Exit status: 0 measured, 2 it could not be run.
    """
    plan = dla_memory.Plan(
        ranks=_integers("--ranks", ranks),
        states=_integers("--states", states),
        chunks=_integers("--chunks", chunks),
        needles=needles,
        fill=fill,
        gates=gates.value,
        seeds=seeds,
    )
    if output is not None:
        dla_report.save(output, {})
    trials = list(dla_memory.trials(plan))
    table = dla_memory.table(plan, trials)
    if output is not None:
        dla_report.save(output, {"memory.md": table.markdown(), "memory_trials.jsonl": dla_report.lines(trials)})
    if as_json:
        print(json.dumps({"gates": plan.gates, "seeds": seeds, "trials": trials}))
    else:
        table.show(Console(highlight=False, soft_wrap=True, width=_WIDE))


def mqar(
    output: Annotated[Path, typer.Option(help="Directory of runs.jsonl, and of the table and picture made of it.")],
    preset: Annotated[Preset, typer.Option(help="What to train; published wants a GPU.")] = Preset.cpu,
    device: Annotated[Device, typer.Option(help="Where PyTorch works.")] = Device.cpu,
    threads: Annotated[int, typer.Option(min=1, help="Of PyTorch.")] = 1,
    table: Annotated[
        bool, typer.Option("--table", help="Train nothing; the table of the runs that are there.")
    ] = False,
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Train DeltaNet, RWKV-7, RWKV-MS and attention on associative recall; compare them at equal states.

    Each run is a line of runs.jsonl as soon as it is done: what was stopped goes on when the command is given again.

    Exit status: 0 done, 2 it could not be run.
    """
    plan = PRESETS[preset.value]
    path = output / "runs.jsonl"
    if table:
        report = Report(plan, read_lines(path))
    else:
        require_torch("llamamem lab mqar", "torch")
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise LlamamemError(f"--output {output}: cannot be made ({e.strerror}); give another") from None
        report = Report(plan, _train(plan.name, path, device.value, threads))
    if report.there:
        dla_report.save(output, {"mqar.md": report.markdown()})
        _drawn(output / "mqar.png", lambda file: _draw_mqar(report, file))
    if as_json:
        print(json.dumps(report.as_dict()))
    else:
        report.show(Console(highlight=False, soft_wrap=True, width=_WIDE))


def _train(preset: str, path: Path, device: str, threads: int) -> list[Line]:
    from llamamem.lab.mqar import compare

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("runs", total=None)

        def show(run: Run, epoch: int, loss: float, seen: float, n: int, total: int) -> None:
            text = f"{run.key}: epoch {epoch}, loss {loss:.3f}, accuracy {seen:.3f}"
            bar.update(task, completed=n, total=total, description=text)

        def done(line: Line, n: int, total: int) -> None:
            if not console.is_terminal:
                text = ", ".join(f"{name} {share:.3f}" for name, share in line["accuracy"].items())
                print(f"llamamem: {n}/{total} {line['run']}: {text}", file=sys.stderr, flush=True)

        return compare(PRESETS[preset], path, device=device, threads=threads, show=show, done=done)


def _draw_dla(results: dla_lab.Results, path: Path) -> None:
    from llamamem.lab.dla_picture import draw

    draw(results, path)


def _draw_mqar(report: Report, path: Path) -> None:
    from llamamem.lab.mqar_picture import draw

    draw(report, path)


def _drawn(path: Path, draw) -> None:  # type: ignore[no-untyped-def]
    """A picture, where there is matplotlib: the figures are in the tables as well."""
    if find_spec("matplotlib") is None:
        print(
            f"llamamem: {path.name} is left out: run `pip install -e '.[plots]'` in llamamem's checkout",
            file=sys.stderr,
        )
    else:
        draw(path)


def _settings(text: str) -> tuple[Setting, ...]:
    try:
        made = tuple(Setting(*(int(number) for number in part.split(":"))) for part in text.split(","))
    except (ValueError, TypeError):
        made = ()
    if not made or any(not (1 <= one.segments <= 256 and 1 <= one.length <= 256 and one.budget >= 1) for one in made):
        raise LlamamemError(f"--sizes {text}: give {_SIZES}, such as 8:12:16,16:8:12 (at most 256:256:K)")
    return made


def _integers(option: str, text: str) -> tuple[int, ...]:
    try:
        made = tuple(int(part) for part in text.split(","))
    except ValueError:
        made = ()
    if not made or any(not 1 <= one <= 1 << 20 for one in made):
        raise LlamamemError(f"{option} {text}: give numbers from 1 on with commas between, such as 4,8")
    return made
