"""`llamamem parity`: logits computed in process against logits from elsewhere."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from llamamem.cli.base import base_file


class KvType(str, Enum):
    f32 = "f32"
    f16 = "f16"


def register(app: typer.Typer) -> None:
    app.command()(parity)


def parity(
    model: Annotated[
        Path | None, typer.Option(help="Base GGUF, or a name that `llamamem pull` knows.", callback=base_file)
    ] = None,
    ids: Annotated[Path | None, typer.Option(help=".npy or FILE.npz:NAME, token ids [n], fed from position 0.")] = None,
    logits: Annotated[
        Path | None, typer.Option(help=".npy or FILE.npz:NAME, reference logits [n, vocabulary].")
    ] = None,
    fixture: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of a whole model: all of it, as `fixture check --engine native`."),
    ] = None,
    sidecar: Annotated[Path | None, typer.Option(help="Memory sidecar GGUF; without it the base runs.")] = None,
    ubatch: Annotated[int, typer.Option(min=1, help="Tokens in a microbatch.")] = 512,
    kv: Annotated[KvType, typer.Option(help="Type of the KV cache.")] = KvType.f32,
    exact_gelu: Annotated[
        bool, typer.Option("--exact-gelu", help="Use the test build, whose CPU GELU is exact.")
    ] = False,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    gpu_layers: Annotated[int, typer.Option(min=-1, help="Layers on the GPU, if there is one: 0 none, -1 all.")] = -1,
    states: Annotated[
        Path | None, typer.Option(help=".npz, reference states S, prev, pos after the last token.")
    ] = None,
    states_prefix: Annotated[str, typer.Option(help="Prefix of the names in --states.")] = "",
    atol: Annotated[float | None, typer.Option(help="Exit 1 when max_abs_diff is above this.")] = None,
    bin_dir: Annotated[Path | None, typer.Option(help="A build made elsewhere.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Compare the logits of every position with given ones, computed in process (flash attention off).

    With --fixture DIR everything is in a folder: base, adapter, ids, logits and states. The sidecar is exported, and
    every case is run with the exact GELU and an F32 KV cache, at microbatches of 1, 7 and 512.

    Exit status: 0 it ran, whatever it found, 1 max_abs_diff is above --atol, or a case of --fixture above its bounds,
    2 it could not be run.
    """
    from llamamem.errors import LlamamemError

    if fixture is not None:
        if model or ids or logits or sidecar or states:
            raise LlamamemError("--fixture has all of it in its folder; give it alone")
        from llamamem.cli.fixture import Engine, check

        check([fixture], Engine.native, atol, bin_dir=bin_dir, as_json=as_json)
        return
    if model is None or ids is None or logits is None:
        raise LlamamemError("give --model, --ids and --logits, or --fixture DIR")
    from llamamem.native.runtime import Model, load_library
    from llamamem.proof.parity import load_ids, load_logits, load_states, measure_parity

    id_array, logit_array = load_ids(ids), load_logits(logits)
    if states is not None and sidecar is None:
        raise LlamamemError("--states compares the memory's states: it needs --sidecar")
    expected = None if states is None else load_states(states, states_prefix)
    library = load_library(exact_gelu=exact_gelu, bin_dir=bin_dir)
    with Model.open(model, sidecar, gpu_layers=gpu_layers, untested=True) as opened:
        result = measure_parity(
            opened, id_array, logit_array, n_ubatch=ubatch, kv=kv.value, threads=threads, states=expected
        )
    if as_json:
        setting = {
            "model": str(model),
            "sidecar": None if sidecar is None else str(sidecar),
            "ubatch": ubatch,
            "kv": kv.value,
            "exact_gelu": exact_gelu,
            "threads": threads,
            "gpu_layers": gpu_layers,
            "build": library.build_id,
        }
        typer.echo(json.dumps({**result.to_dict(), **setting}))
    else:
        typer.echo(f"tokens          {result.n_tokens}")
        typer.echo(f"max |diff|      {result.max_abs_diff:.3e} (token {result.worst_token})")
        typer.echo(f"median |diff|   {result.median_abs_diff:.3e}")
        typer.echo(f"top-1 agreement {result.top1_agreement:.2%} ({result.argmax_differences} differ)")
        if result.states is not None:
            counts = "equal" if result.states.tokens_written_equal else "DIFFERENT"
            typer.echo(f"states max |diff| S {result.states.S_max_abs_diff:.3e}")
            typer.echo(f"states max |diff| prev {result.states.prev_max_abs_diff:.3e}")
            typer.echo(f"tokens written  {counts}")
    if atol is not None and not result.max_abs_diff <= atol:
        raise typer.Exit(1)
