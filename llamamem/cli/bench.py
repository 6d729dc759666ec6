"""`llamamem bench`: what the memory costs, sidecar over base, in one process."""

from __future__ import annotations

import json
import os
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from llamamem.cli.base import base_file
from llamamem.errors import LlamamemError


class KvType(str, Enum):
    f16 = "f16"
    f32 = "f32"


def register(app: typer.Typer) -> None:
    app.command()(bench)


def bench(
    model: Annotated[Path, typer.Option(help="Base GGUF, or a name that `llamamem pull` knows.", callback=base_file)],
    sidecar: Annotated[
        Path | None, typer.Option(help="Memory sidecar GGUF; without it the base runs against itself.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt (prefill).")] = 512,
    gen: Annotated[int, typer.Option(min=1, help="Tokens decoded one at a time.")] = 32,
    ubatch: Annotated[int, typer.Option(min=1, help="Tokens in a microbatch.")] = 512,
    repeat: Annotated[int, typer.Option(min=1, help="Counted repeats; one more warms up.")] = 5,
    kv: Annotated[KvType, typer.Option(help="Type of the KV cache.")] = KvType.f16,
    gpu_layers: Annotated[int, typer.Option(min=-1, help="Layers on the GPU, if there is one: 0 none, -1 all.")] = -1,
    profile: Annotated[bool, typer.Option("--profile", help="Also time the memory's op alone.")] = False,
    bin_dir: Annotated[Path | None, typer.Option(help="A build made elsewhere.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Time base and sidecar by turns in one process and print the ratios (sidecar / base; 1 costs nothing).

    --profile then runs the sidecar once more with every node of the graph computed alone: what the op takes for a token
    and layer, and its part of all. On a GPU a node alone costs more than it does in its place: an upper bound.

    Exit status: 0 it ran, 2 it could not be run.
    """
    from rich.console import Console
    from rich.table import Table

    from llamamem.native.cpu import cpu_name
    from llamamem.native.runtime import load_library
    from llamamem.proof.bench import run_bench
    from llamamem.proof.profile import run_profile

    if profile and sidecar is None:
        raise LlamamemError("--profile times the memory: it needs --sidecar")
    library = load_library(bin_dir=bin_dir)
    talk = Console(stderr=True)
    run: dict[str, Any] = {
        "prompt": prompt,
        "gen": gen,
        "n_ubatch": ubatch,
        "repeat": repeat,
        "threads": threads,
        "kv": kv.value,
        "gpu_layers": gpu_layers,
    }
    result = run_bench(model, sidecar, **run, progress=lambda text: talk.print(text, style="dim", highlight=False))
    profiled = run_profile(model, sidecar, **run) if profile and sidecar is not None else None
    if as_json:
        setting = {
            "model": str(model),
            "sidecar": None if sidecar is None else str(sidecar),
            "threads": threads,
            "ubatch": ubatch,
            "repeat": repeat,
            "kv": kv.value,
            "gpu_layers": gpu_layers,
            "profile": None if profiled is None else profiled.to_dict(),
            "cpu": cpu_name(),
            "cpus": os.cpu_count(),
            "build": library.build_id,
        }
        typer.echo(json.dumps({**result.to_dict(), **setting}))
        return
    where = f", memory on {', '.join(result.devices)}" if result.devices else ""
    table = Table(
        title=f"{model.name}: {threads} thread(s) of {cpu_name()}, -ub {ubatch}, {repeat} repeats{where};"
        " ratios are sidecar / base"
    )
    for column in ("", "tokens", "base t/s", "sidecar t/s", "medians", "minima", "CPU time"):
        table.add_column(column, justify="left" if not column else "right")
    rows = (("prefill", result.prefill), ("decode", result.decode), ("at -ub 1", result.prefill_ub1))
    for name, timing in rows:
        table.add_row(
            name,
            str(timing.n_tokens),
            f"{timing.rate('base'):.1f}",
            f"{timing.rate('sidecar'):.1f}",
            f"{timing.ratio_median:.3f}",
            f"{timing.ratio_min:.3f}",
            f"{timing.ratio_cpu:.3f}",
        )
    Console().print(table)
    typer.echo(f"a prompt token takes {result.ub1_slowdown:.1f} times as long at -ub 1 (sidecar)")
    if profiled is not None:
        for name, phase in (("prefill", profiled.prefill), ("decode", profiled.decode)):
            typer.echo(
                f"{name}: the op takes {phase.us_per_token_layer:.2f} us a token and layer,"
                f" {phase.share:.2%} of all nodes' time"
            )
