"""`llamamem bench`: what the memory costs, sidecar over base, in one process."""

from __future__ import annotations

import json
import os
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class KvType(str, Enum):
    f16 = "f16"
    f32 = "f32"


def register(app: typer.Typer) -> None:
    app.command()(bench)


def bench(
    model: Annotated[Path, typer.Option(help="Base GGUF.")],
    sidecar: Annotated[
        Path | None, typer.Option(help="Memory sidecar GGUF; without it the base runs against itself.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt (prefill).")] = 512,
    gen: Annotated[int, typer.Option(min=1, help="Tokens decoded one at a time.")] = 32,
    ubatch: Annotated[int, typer.Option(min=1, help="Tokens in a microbatch.")] = 512,
    repeat: Annotated[int, typer.Option(min=1, help="Counted repeats; one more warms up.")] = 5,
    kv: Annotated[KvType, typer.Option(help="Type of the KV cache.")] = KvType.f16,
    bin_dir: Annotated[Path | None, typer.Option(help="A build made elsewhere.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Time base and sidecar by turns in one process and print the ratios (sidecar / base; 1 costs nothing).

    Exit status: 0 it ran, 2 it could not be run.
    """
    from rich.console import Console
    from rich.table import Table

    from llamamem.native.runtime import load_library
    from llamamem.proof.bench import run_bench

    library = load_library(bin_dir=bin_dir)
    talk = Console(stderr=True)
    result = run_bench(
        model,
        sidecar,
        prompt=prompt,
        gen=gen,
        n_ubatch=ubatch,
        repeat=repeat,
        threads=threads,
        kv=kv.value,
        progress=lambda text: talk.print(text, style="dim", highlight=False),
    )
    if as_json:
        setting = {
            "model": str(model),
            "sidecar": None if sidecar is None else str(sidecar),
            "threads": threads,
            "ubatch": ubatch,
            "repeat": repeat,
            "kv": kv.value,
            "cpus": os.cpu_count(),
            "build": library.build_id,
        }
        typer.echo(json.dumps({**result.to_dict(), **setting}))
        return
    table = Table(title=f"{model.name}: {threads} thread(s), -ub {ubatch}, {repeat} repeats; ratios are sidecar / base")
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
