"""llamamem state: shows what is in saved memories, compares them, and makes new ones of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from llamamem.cli.rebase import rebase_state
from llamamem.errors import LlamamemError
from llamamem.formats.outputs import check_target
from llamamem.formats.sidecar import DELTA_RULE, Sidecar, read_sidecar
from llamamem.formats.sidecar.inspect import printable
from llamamem.formats.state import KINDS, Identity, State, identity_of, read_state, write_state
from llamamem.formats.state import math as state_math
from llamamem.formats.state.block import is_memory_file
from llamamem.formats.state.picture import draw_state, is_png

_MOST_NUMBERS = 4  # matrices of a layer whose norms fit a line
_MOST_MARKS = 40  # and of which a mark each fits

File = Annotated[Path, typer.Argument(metavar="FILE", help="Saved state.", show_default=False)]
Output = Annotated[Path, typer.Option(metavar="FILE", help="Memory-only state to write.", show_default=False)]
Bound = Annotated[
    Path | None, typer.Option("--sidecar", metavar="SIDECAR.gguf", help="Also check that it belongs to this sidecar.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout.")]


def register(app: typer.Typer) -> None:
    """Adds `llamamem state show`, `diff`, `blend`, `decay`, `verify` and `rebase`."""
    group = typer.Typer(help="Show, compare, blend and check saved memories.", no_args_is_help=True)
    for verb in (show, diff, blend, decay, verify):
        group.command()(verb)
    group.command("rebase")(rebase_state)
    app.add_typer(group, name="state")


def show(
    file: File,
    sidecar: Bound = None,
    png: Annotated[Path | None, typer.Option(metavar="OUT.png", help="Also draw the matrices.")] = None,
    as_json: Json = False,
) -> None:
    """Show what a state belongs to, how much was written to it, and how much of it is in use.

    Exit status: 0 shown, 2 it is damaged or of another sidecar.
    """
    bound = read_sidecar(sidecar) if sidecar else None
    state = _read(file, sidecar=bound)
    layers = [layer.layer for layer in bound.layers] if bound else None
    if png:
        check_target(png, "--png", (file,), is_png, "a PNG")
        title = f"{printable(file.name)}: {_written(state, 0)}"
        draw_state(state, png, layers or range(state.layers), title)
    found = state_math.describe(state, layers)
    typer.echo(json.dumps(found, allow_nan=False) if as_json else "\n".join(_summary(state, found)))


def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="Saved state.", show_default=False)],
    b: Annotated[Path, typer.Argument(metavar="B", help="Saved state.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Compare two memories layer by layer. Their tokens and KV caches are not compared.

    Exit status: 0 equal, 1 different, 2 they do not go together.
    """
    x, y = _read(a), _read(b)
    equal, rows = state_math.same(x, y), state_math.diff(x, y)
    if as_json:
        typer.echo(json.dumps({"equal": equal, "layers": [asdict(row) for row in rows]}, allow_nan=False))
    else:
        typer.echo("layer         L2  relative    cosine   max |d|    prev L2    tokens")
        for row in rows:
            cosine = "-" if row.cosine is None else f"{row.cosine:.6f}"
            numbers = f"{row.l2:9.3e} {row.relative:9.3e} {cosine:>9} {row.max_abs:9.3e}  {row.prev_l2:9.3e}"
            typer.echo(f"{row.layer:5}  {numbers} {row.tokens:+9}")
        typer.echo("equal" if equal else "different")
    if not equal:
        raise typer.Exit(1)


def blend(
    a: Annotated[Path, typer.Argument(metavar="A", help="State that goes on.", show_default=False)],
    b: Annotated[Path, typer.Argument(metavar="B", help="State that is mixed into it.", show_default=False)],
    alpha: Annotated[float, typer.Option(help="Share of B, 0 to 1.", show_default=False)],
    output: Output,
) -> None:
    """Write (1 - alpha) A + alpha B as a new memory. The token counter stays A's: B is mixed in where A stands.

    Exit status: 0 written, 2 they do not go together.
    """
    check_target(output, "--output", (a, b), is_memory_file, "a memory-only state")
    _report(write_state(output, state_math.blend(_read(a), _read(b), alpha)))


def decay(
    a: Annotated[Path, typer.Argument(metavar="A", help="Saved state.", show_default=False)],
    factor: Annotated[float, typer.Option(help="0 forgets all, 1 nothing.", show_default=False)],
    output: Output,
) -> None:
    """Write A with its matrices times a factor as a new memory. The token counter stays A's.

    Exit status: 0 written, 2 it could not be.
    """
    check_target(output, "--output", (a,), is_memory_file, "a memory-only state")
    _report(write_state(output, state_math.decay(_read(a), factor)))


def verify(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Saved states.", show_default=False)],
    sidecar: Bound = None,
    as_json: Json = False,
) -> None:
    """Make every check of saved states, a line each.

    Exit status: 0 all pass, 2 one does not.
    """
    bound = read_sidecar(sidecar) if sidecar else None
    identity = identity_of(bound) if bound else None
    results = []
    for file in files:
        result: dict[str, Any] = {"path": str(file), "ok": True, "reason": None, "message": None}
        try:
            state = _read(file, sidecar=bound, identity=identity)
            line = f"{file}: ok, {KINDS[state.kind]}, {_written(state)}, {state.size} bytes"
            result |= {"kind": KINDS[state.kind], "bytes": state.size, "sha256": state.sha256}
        except LlamamemError as e:
            line = str(e)
            result |= {"ok": False, "reason": e.reason, "message": line}
        results.append(result)
        if not as_json:
            typer.echo(line)
    ok = all(result["ok"] for result in results)
    if as_json:
        typer.echo(json.dumps({"ok": ok, "files": results}, allow_nan=False))
    if not ok:
        raise typer.Exit(2)


def _read(file: Path, *, sidecar: Sidecar | None = None, identity: Identity | None = None) -> State:
    with _hashing(file) as progress:
        return read_state(file, sidecar=sidecar, identity=identity, progress=progress)


@contextmanager
def _hashing(file: Path) -> Iterator[Callable[[int], None]]:
    """A bar over the bytes of a file, on a terminal alone."""
    columns = (TextColumn("checking"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    total = file.stat().st_size if file.is_file() else 0
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=total)
        yield lambda n: bar.advance(task, n)


def _report(state: State) -> None:
    typer.echo(f"{state.path}: {state.provenance}; {_written(state)}, {state.size} bytes", err=True)


def _written(state: State, cell: int | None = None) -> str:
    """Of one sequence: what the next token goes to; of several, how many there are."""
    if cell is None and state.cells > 1:
        used = int((state.tokens_written.max(1) > 0).sum())
        return f"{used} of {state.cells} sequences written to"
    tokens, layer = state.tokens_written[cell or 0], state.tokens_written[cell or 0].argmax()
    if state.memory_kind == DELTA_RULE:
        return f"{tokens[layer]} tokens written"
    at = f"next in chunk {state.current_chunk[cell or 0, layer]}, state {state.current_state[cell or 0, layer]}"
    return f"{tokens[layer]} tokens written, {at}" + ("" if (tokens == tokens[0]).all() else " (layers differ)")


def _summary(state: State, found: dict[str, Any]) -> list[str]:
    lines = [
        f"{state.path}: {found['kind']}, {state.size} bytes",
        f"  sha256    {state.sha256}",
        f"  sidecar   {state.sidecar_sha256}",
        f"  base      {state.base_sha256}",
        f"  shape     {_shape(state)}",
        f"  memory    {_written(state)}",
    ]
    if state.token_ids.size or state.kv_bytes:
        lines.append(f"  text      {state.token_ids.size} token ids, {state.kv_bytes} bytes of KV cache")
    if state.origin_tokens is not None and state.cells == 1:
        lines.append(f"  origin    began from a memory of {state.origin_tokens.max()} tokens")
    if state.made_by_tool:
        lines.append(f"  made by   {printable(state.provenance) or 'a tool'}")
    lines.append("")
    if state.cells == 1:
        return lines + _layer_lines(state, found["sequences"][0]["layers"])
    lines.append("sequence    tokens  chunk  state    norm     max   live")
    for cell, row in enumerate(found["sequences"]):
        norm = sum(layer["norm"] ** 2 for layer in row["layers"]) ** 0.5
        largest = max(layer["max_abs"] for layer in row["layers"])
        live = [matrix["live"] for layer in row["layers"] for matrix in layer["states"]]
        lines.append(
            f"{cell:8}  {row['tokens_written']:8}  {row['current_chunk']:5}  {row['current_state']:5}  {_short(norm)} "
            f"{_short(largest)}   {sum(live)} of {len(live)}"
        )
    return lines


def _shape(state: State) -> str:
    if state.memory_kind == DELTA_RULE:
        return f"{DELTA_RULE}, {state.layers} layers, N {state.heads}, R {state.rank}"
    matrices = f"{state.layers} layers, N {state.heads}, M {state.states}, R {state.rank}"
    return f"{matrices}, C {state.chunk}, semantics {state.semantics}"


def _layer_lines(state: State, rows: list[dict[str, Any]]) -> list[str]:
    """Norm and largest value of every matrix where they fit, else a mark for each."""
    matrices = state.heads * state.states
    before = "   |prev|" if state.prev.size else ""  # a delta rule has none
    titles = [f"state {m}" if state.heads == 1 else f"{n}, state {m}" for n, m in np.ndindex(state.heads, state.states)]
    if matrices <= _MOST_NUMBERS:
        heads = "".join(f"{title:>16}" for title in titles)
        lines = [f"layer{before}{heads}", " " * (5 + len(before)) + f"{'norm':>9}{'max':>7}" * matrices]
    else:
        lines = [f"layer{before}    norm     max   live"]
    for row in rows:
        number = row["target_layer"] if row["base_layer"] is None else row["base_layer"]
        line = f"{number:5}" + (f"  {_short(row['prev_norm'])}" if before else "")
        current = row["current_state"] if state.states > 1 else None
        marks = ["*" if cell["state"] == current else "" for cell in row["states"]]
        if matrices <= _MOST_NUMBERS:
            for cell, mark in zip(row["states"], marks, strict=True):
                text = f"{_short(cell['norm'])}{_short(cell['max_abs'])}" if cell["live"] else f"{'empty':>14}"
                line += f"{text}{mark or ' ':>2}"
        else:
            live = [cell["live"] for cell in row["states"]]
            line += f" {_short(row['norm'])} {_short(row['max_abs'])}   {sum(live)} of {matrices}"
            if matrices <= _MOST_MARKS:
                line += "  " + "".join("#" if on else "." for on in live)
        lines.append(line.rstrip())
    marked = matrices <= _MOST_NUMBERS and state.states > 1
    return [*lines, "* the next token is written to this state"] if marked else lines


def _short(value: float) -> str:
    """Seven characters."""
    return f"{value:7.3f}" if value == 0 or 1e-3 <= value < 999 else f"{value:7.0e}"
