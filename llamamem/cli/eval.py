"""`llamamem eval`: a suite of prompts put to a running server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llamamem.cli.session import ApiKey, Json, Run
from llamamem.cli.trace import Url

if TYPE_CHECKING:
    from llamamem.formats.results import Answer
    from llamamem.formats.suite import Suite
    from llamamem.proof.evaluate import Comparison, Evaluation, Progress, Settings


def register(app: typer.Typer) -> None:
    app.command("eval")(evaluate_command)


def evaluate_command(
    suite: Annotated[Path, typer.Argument(metavar="SUITE", help="JSON Lines, or plain text with one prompt a line.")],
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keep each answer there, as JSON Lines; go on where it ends.")
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System prompt, where a line has none.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer, where a line does not say.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float | None, typer.Option(min=0, max=1, help="With a temperature above 0.")] = None,
    top_k: Annotated[int | None, typer.Option(min=0, help="With a temperature above 0.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the sampling.")] = 123,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="The first N lines only.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, metavar="N", help="Lines at a time.")] = 1,
    compare: Annotated[
        str | None,
        typer.Option(
            metavar="BASE_RUN",
            help="Another run that is asked the same, or the --output of one: both are put side by side.",
        ),
    ] = None,
    run: Run = None,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """Put a suite of prompts to a running server, and hold the answers against what each line expects.

    Every line is a conversation of its own: {"id", "prompt" or "messages"} and,
    if wanted, "expect" (of "exact", "contains", "not_contains", "regex",
    "json_schema", "ignore_case"), "group" and "max_tokens".

    Exit status: 0 all was answered as expected, 1 some was not, 2 it could not
    be run. A base run has no say in it.
    """
    from llamamem.formats.suite import read_suite
    from llamamem.proof.evaluate import Settings
    from llamamem.proof.evaluate import compare as side_by_side

    lines = read_suite(suite).first(limit)
    settings = Settings(system, temperature, top_p, top_k, seed, max_tokens)
    done = _run(lines, settings, concurrency, output, (run, url, api_key), "")
    comparison = None
    if compare is not None:
        base = _base(lines, settings, concurrency, output, compare, api_key)
        comparison = side_by_side(done, base, compare)
    if as_json:
        print(json.dumps(_as_json(lines, output, settings, done, comparison)))
    else:
        _print(done, comparison)
    raise typer.Exit(0 if done.ok else 1)


def _run(
    lines: Suite,
    settings: Settings,
    concurrency: int,
    output: Path | None,
    target: tuple[str | None, str | None, str | None],
    label: str,
) -> Evaluation:
    from llamamem.errors import LlamamemError
    from llamamem.proof.evaluate import evaluate
    from llamamem.serving.target import open_target

    client, record = open_target(*target)
    options: dict[str, Any] = {"record": record, "output": output, "concurrency": concurrency}
    try:
        with client, _progress(f"eval{label}", len(lines.lines)) as progress:
            done = evaluate(client, lines, settings, progress=progress, **options)
    except KeyboardInterrupt as e:
        raise LlamamemError("interrupted; with --output the answers are kept") from e
    return done


def _base(
    lines: Suite, settings: Settings, concurrency: int, output: Path | None, base: str, api_key: str | None
) -> dict[str, Answer]:
    from llamamem.formats.results import read_results

    if Path(base).is_file():
        return read_results(Path(base))
    beside = output and output.with_name(f"{output.stem}.base{output.suffix}")
    done = _run(lines, settings, concurrency, beside, (base, None, api_key), " base")
    return {answer.id: answer for answer in done.answers}


@contextmanager
def _progress(label: str, total: int) -> Iterator[Progress]:
    """A bar on a terminal, nothing elsewhere."""
    from rich.console import Console
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    with Bar(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=total)
        yield lambda _: bar.advance(task)


def _as_json(
    lines: Suite, output: Path | None, settings: Settings, done: Evaluation, comparison: Comparison | None
) -> dict[str, Any]:
    fields = {"id", "group", "ok", "failures", "error", "response", "finish_reason", "latency_ms", "memory"}
    sides = None
    if comparison is not None:
        sides = {
            "base": comparison.base.model_dump(),
            "better": comparison.better,
            "worse": comparison.worse,
            "same_text": comparison.same_text,
            "lines": [asdict(pair) for pair in comparison.pairs],
        }
    return {
        "ok": done.ok,
        "suite": lines.path,
        "suite_sha256": lines.sha256,
        "output": None if output is None else str(output),
        "settings": asdict(settings),
        "served": done.served.model_dump(),
        "summary": done.summary(),
        "results": [answer.model_dump(mode="json", include=fields) for answer in done.answers],
        "compare": sides,
    }


def _print(done: Evaluation, comparison: Comparison | None) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 10_000  # one line an answer, for whoever reads on
    base = {pair.id: pair for pair in comparison.pairs} if comparison else {}
    wrong = any(answer.failures for answer in done.answers)
    columns = ["id", "holds", *(["base"] if base else []), "ms", "answer", *(["base answer"] if base else [])]
    table = Table(*columns, *(["why not"] if wrong else []), box=None, pad_edge=False)
    for answer in done.answers:
        cells = [answer.id, _holds(answer), f"{answer.latency_ms:.0f}", _short(answer.error or answer.response or "")]
        if base:
            cells.insert(2, _HOLDS[base[answer.id].base_ok])
            cells.append(_short(base[answer.id].base_response or ""))
        table.add_row(*map(escape, [*cells, *(["; ".join(answer.failures)] if wrong else [])]))
    console.print(table)
    summary = done.summary()
    for name, counts in summary["groups"].items():
        console.print(f"{escape(name)}: {counts['passed']} of {counts['checked']}", soft_wrap=True)
    console.print(
        f"{summary['passed']} of {summary['checked']} as expected, {summary['lines']} lines, {summary['errors']}"
        f" refused, {summary['kept']} kept from before; {summary['prompt_tokens']} prompt tokens,"
        f" {summary['completion_tokens']} new",
        soft_wrap=True,
    )
    if comparison is not None:
        console.print(
            f"only here as expected: {escape(', '.join(comparison.better)) or 'none'}; only in the base run:"
            f" {escape(', '.join(comparison.worse)) or 'none'}; {comparison.same_text} texts are the same",
            soft_wrap=True,
        )


_HOLDS = {True: "yes", False: "no", None: "-"}


def _holds(answer: Answer) -> str:
    return "refused" if answer.error is not None else _HOLDS[answer.ok]


def _short(text: str) -> str:
    shown = "".join(c if c.isprintable() else "·" for c in text)
    return shown if len(shown) <= 48 else f"{shown[:47]}…"
