"""`llamamem smoke`: base, sidecar and zeroed sidecar on one prompt."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from llamamem.cli.base import base_file
from llamamem.native.build import find_build
from llamamem.proof.smoke import DEFAULT_PROMPT, Generated, SmokeReport, smoke


def register(app: typer.Typer) -> None:
    app.command("smoke")(smoke_command)


def smoke_command(
    model: Annotated[Path, typer.Option(help="Base GGUF, or a name that `llamamem pull` knows.", callback=base_file)],
    sidecar: Annotated[Path, typer.Option(help="Sidecar GGUF.")],
    prompt: Annotated[str, typer.Option(help="What all three are asked.")] = DEFAULT_PROMPT,
    n_predict: Annotated[int, typer.Option("-n", "--n-predict", help="Tokens to generate.")] = 48,
    ctx_size: Annotated[int, typer.Option(help="Tokens of context.")] = 2048,
    bin_dir: Annotated[Path | None, typer.Option(help="Directory of a build made elsewhere.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Does the sidecar change the greedy text, and a zeroed sidecar leave it as it is?

    llama-completion runs three times on the prompt: base, sidecar, sidecar with its deltas zeroed. Text proves nothing
    about a server; `llamamem health` does.

    Exit status: 0 base and sidecar part and base and zeroed agree, 1 they do not, 2 it could not be run.
    """
    build = find_build(bin_dir=bin_dir)
    report = smoke(model, sidecar, bin_dir=build.bin_dir, prompt=prompt, n_predict=n_predict, ctx_size=ctx_size)
    if as_json:
        print(json.dumps({"ok": report.ok, **asdict(report)}))
    else:
        print_report(report, Console(soft_wrap=True, highlight=False))
    raise typer.Exit(0 if report.ok else 1)


def print_report(report: SmokeReport, console: Console) -> None:
    def show(name: str, run: Generated) -> None:
        text = "".join(c if c.isprintable() else "·" for c in run.text)
        console.print(f"  {name:<8} {escape(text)}")

    show("base", report.base)
    show("sidecar", report.sidecar)
    show("zeroed", report.zeroed)
    if report.parted_token is not None:
        base, sidecar = ("the end" if t is None else t for t in (report.base_token, report.sidecar_token))
        console.print(
            f"base and sidecar part at new token {report.parted_token} (counted from 0): {base} and {sidecar}"
        )
    else:
        console.print("[red]base and sidecar do not part: the memory has no effect on this prompt[/]")
    if report.zeroed_equals_base:
        console.print("zeroed sidecar and base agree, token for token")
    else:
        console.print("[red]zeroed sidecar and base differ: more than the deltas changes the output[/]")
    console.print("This is about one text only; the proof is `llamamem health`, against a running server.")
