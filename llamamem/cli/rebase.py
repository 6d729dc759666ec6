"""`llamamem state rebase` and `llamamem session rebase`: memories go along to another quantisation of their base."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from llamamem.cli.base import base_file
from llamamem.cli.completion import session_names
from llamamem.errors import LlamamemError
from llamamem.formats.base import base_files
from llamamem.formats.gguf_file import read_gguf_index
from llamamem.formats.outputs import check_target
from llamamem.formats.state import decode_state, encode_state, read_state, write_state
from llamamem.formats.state.block import is_memory_file
from llamamem.proof.rebase import Move, prove_move, rebase

File = Annotated[Path, typer.Argument(metavar="FILE", help="Saved state.", show_default=False)]
Output = Annotated[Path, typer.Option(metavar="FILE", help="Memory-only state to write.", show_default=False)]
OldSidecar = Annotated[
    Path, typer.Option("--sidecar", metavar="OLD.gguf", help="Sidecar that made it.", show_default=False)
]
OldBase = Annotated[
    Path,
    typer.Option("--base", metavar="OLD.gguf", help="Base of that sidecar.", callback=base_file, show_default=False),
]
NewSidecar = Annotated[
    Path,
    typer.Option("--to-sidecar", metavar="NEW.gguf", help="Its rebound copy (sidecar rebind).", show_default=False),
]
NewBase = Annotated[
    Path,
    typer.Option(
        "--to-base",
        metavar="NEW.gguf",
        help="Another quantisation of the model.",
        callback=base_file,
        show_default=False,
    ),
]
Store = Annotated[
    str | None,
    typer.Option(
        metavar="DIR|sqlite:FILE", envvar="LLAMAMEM_SESSIONS", help="Where sessions are kept; else in the user's data."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def rebase_state(
    file: File,
    sidecar: OldSidecar,
    base: OldBase,
    to_sidecar: NewSidecar,
    to_base: NewBase,
    output: Output,
    as_json: Json = False,
) -> None:
    """Move a memory to another quantisation of its base, after a proof that it is one.

    Both sidecars must hold the same adapter, and no tensor of the bases may
    differ by more than their two roundings explain. Other weights are
    refused: the numbers of a memory mean nothing to them. What is written is
    the memory alone; the text is read again.

    Exit status: 0 written, 2 refused.
    """
    check_target(output, "--output", (file, sidecar, base, to_sidecar, to_base), is_memory_file, "a memory-only state")
    state = read_state(file)
    move = _prove(sidecar, base, to_sidecar, to_base)
    written = write_state(output, rebase(state, move))
    _report({**_proof(move), "path": str(output), "sha256": written.sha256}, as_json)


def rebase_sessions(
    sidecar: OldSidecar,
    base: OldBase,
    to_sidecar: NewSidecar,
    to_base: NewBase,
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME...]", help="Sessions; none: all.", autocompletion=session_names),
    ] = None,
    store: Store = None,
    as_json: Json = False,
) -> None:
    """Move sessions to another quantisation of their base, after a proof that it is one: `state rebase` of each.

    Each gets a new generation; `session undo` goes back. Sessions of other
    sidecars are left alone, and so are those without a memory.

    Exit status: 0 done, 2 refused, or a session that was named is not of that sidecar.
    """
    from llamamem.cli.session import open_given_store
    from llamamem.sessions.session import Memory

    opened = open_given_store(store, must_exist=True)
    move = _prove(sidecar, base, to_sidecar, to_base)
    moved, left = [], []
    for name in names or [entry.session.name for entry in opened.entries() if entry.session]:
        session, data = opened.load(name)
        if data is None or (session.sidecar_sha256, session.base_sha256) != move.old:
            if names:
                raise LlamamemError(f"session {name!r}: has no memory of {sidecar} on {base}; it was left as it is")
            left.append(name)
            continue
        state = rebase(decode_state(data, identity=move.old), move)
        opened.save(session, Memory(encode_state(state), session.tokens, *move.new))
        moved.append(name)
    _report({**_proof(move), "moved": moved, "left": left}, as_json)


def _prove(sidecar: Path, base: Path, to_sidecar: Path, to_base: Path) -> Move:
    with _comparing(base, to_base) as progress:
        return prove_move(sidecar, base, to_sidecar, to_base, progress)


def _proof(move: Move) -> dict[str, Any]:
    return {"tensors": move.bases.n_tensors, "most": move.bases.most, "tensor": move.bases.tensor}


def _report(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(found))
        return
    if found["tensors"]:
        typer.echo(
            f"one model: {found['tensors']} tensors, none differs by more than {found['most']:.2f} of what the two"
            f" roundings explain ({found['tensor'] or 'none differs'})",
            err=True,
        )
    if "path" in found:
        typer.echo(f"{found['path']}: sha256 {found['sha256']}", err=True)
    else:
        typer.echo(f"{len(found['moved'])} sessions moved, {len(found['left'])} of other sidecars left", err=True)


@contextmanager
def _comparing(*bases: Path) -> Iterator[Callable[[int], None]]:
    """A bar over the bytes of the bases, on a terminal alone."""
    total = 0
    if sys.stderr.isatty():
        total = sum(path.stat().st_size for base in bases for path in base_files(read_gguf_index(base)))
    columns = (TextColumn("comparing"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not total) as bar:
        task = bar.add_task("", total=total)
        yield lambda n: bar.advance(task, n)
