"""`llamamem health`: is the memory of a running server live, complete, isolated and restorable?"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from llamamem.cli.base import base_file
from llamamem.cli.session import ApiKey, Run, Url
from llamamem.errors import LlamamemError

if TYPE_CHECKING:
    from llamamem.formats.health import HealthReport


def register(app: typer.Typer) -> None:
    app.command("health")(health)


def health(
    run: Run = None,
    url: Url = None,
    slot_dir: Annotated[Path | None, typer.Option(help="That server's --slot-save-path.")] = None,
    model: Annotated[Path | None, typer.Option(help="That server's base GGUF.", callback=base_file)] = None,
    sidecar: Annotated[Path | None, typer.Option(help="That server's sidecar.")] = None,
    log: Annotated[Path | None, typer.Option(help="That server's log.")] = None,
    api_key: ApiKey = None,
    trace: Annotated[
        Path | None, typer.Option(metavar="TRACE.json", help="Also compare the answer to a reference trace.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object (with --watch one a line).")] = False,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the JSON object there; removed when it cannot run.")
    ] = None,
    watch: Annotated[
        float | None, typer.Option(metavar="SECONDS", min=0, help="Again and again, until Ctrl-C.")
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(metavar="SECONDS", min=0.1, help="Longest wait for one answer; 120, of --probe 5.")
    ] = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="Only ask whether it is ready, with its memory: no slot is touched.")
    ] = False,
) -> None:
    """Prove by behaviour that the memory of a running server is live, complete, isolated and restorable.

    Uses a slot that holds nothing, or puts back what it held, also when it is ended by Ctrl-C, SIGTERM or SIGHUP; after
    a SIGKILL the next run does. Without --run or --url: the only server that `llamamem serve` started.

    --probe is for a container's health check or a load balancer, at any rate: a request or two, exit status 0 or 1.

    Exit status: 0 all checks hold, 1 some fail, 2 it could not be run, 128 and its number after a signal. With --watch
    that of the last report.
    """
    if probe:
        for name, value in (("--watch", watch), ("--output", output), ("--trace", trace)):
            if value is not None:
                raise LlamamemError(f"--probe and {name}: a probe computes nothing; leave {name} out")
        _probe(run, url, api_key, timeout or 5.0, as_json)
    from llamamem.formats.health import check_output, withdraw_health, write_health
    from llamamem.proof.health import check_health, find_target
    from llamamem.serving.target import first_key, server_url

    timeout = timeout or 120.0
    if output is not None:
        check_output(output)
    url = server_url(url) if url else None
    target = find_target(run, url, model=model, sidecar=sidecar, log=log, slot_dir=slot_dir, trace=trace)
    key = first_key(api_key)
    status = 2
    try:
        with _ended_in_order():
            while True:
                try:
                    with _progress() as (on_check, on_hash):
                        report = check_health(target, api_key=key, timeout=timeout, progress=on_hash, on_check=on_check)
                except LlamamemError:
                    if output is not None:
                        withdraw_health(output)
                    raise
                status = 0 if report.ok else 1
                if output is not None:
                    write_health(report, output)
                if as_json:
                    print(report.model_dump_json(), flush=True)
                else:
                    print_report(report, Console(highlight=False))
                if watch is None:
                    break
                time.sleep(watch)
    except _Ended as end:
        if watch is None or end.number != signal.SIGINT:
            status = 128 + end.number  # as a shell has it
    raise typer.Exit(status)


class _Ended(BaseException):
    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """Raises _Ended once for the signals that ask for an end; more of them do not disturb what is being put back."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}

    def end(number: int, _: object) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        raise _Ended(number)

    for number in numbers:
        if before[number] is not signal.SIG_IGN:  # as nohup has it
            signal.signal(number, end)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, before[number])


def _probe(run: str | None, url: str | None, api_key: str | None, timeout: float, as_json: bool) -> NoReturn:
    from llamamem.serving.probe import ProbeReport, probe
    from llamamem.serving.runs import live_runs
    from llamamem.serving.target import open_target

    if run is None and url is None and not live_runs():
        report = ProbeReport(False, None, "no server runs")
    else:
        client, record = open_target(run, url, api_key, timeout=timeout)
        with client:
            report = probe(client, record)
    print(json.dumps(report.as_dict()) if as_json else ": ".join(filter(None, (report.url, report.detail))))
    raise typer.Exit(0 if report.ok else 1)


def print_report(report: HealthReport, console: Console) -> None:
    if not console.is_terminal:
        console.width = 10_000  # one line a check, for whoever reads on
    failed = [check.id for check in report.checks if not check.ok]
    result = f"[red]{len(failed)} of {len(report.checks)} checks fail[/]" if failed else "[green]healthy[/]"
    console.print(f"{result}  {escape(report.url)}  {escape(report.run_id or '')}  {_clock(report.timestamp)}")
    table = Table(box=None, show_header=False, pad_edge=False)
    for check in report.checks:
        mark = "[green]ok[/]" if check.ok else "[red]FAIL[/]"
        said = check.detail if check.hint is None else f"{check.detail} -> {check.hint}"
        table.add_row(mark, check.id, escape(said), f"[dim]{check.ms:.0f} ms[/]")
    console.print(table)


def _clock(time: datetime) -> str:
    return time.astimezone().strftime("%H:%M:%S")


@contextmanager
def _progress() -> Iterator[tuple[Callable[[str], None], Callable[[int, int], None]]]:
    """What is being done now, on a terminal alone."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield (
            lambda name: bar.update(task, description=name),
            lambda done, total: bar.update(task, description=f"hashing the base, {100 * done // max(1, total)}%"),
        )
