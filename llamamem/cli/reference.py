"""`llamamem reference`: the PyTorch runtime. Needs PyTorch and transformers."""

from __future__ import annotations

import json
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llamamem.cli.base import base_file, base_name
from llamamem.errors import LlamamemError
from llamamem.reference.require import require_torch

if TYPE_CHECKING:
    from llamamem.proof.conversation_report import Turn
    from llamamem.reference.talk import Said


class Dtype(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Gelu(str, Enum):
    exact = "exact"
    ggml = "ggml"


class Profile(str, Enum):
    serial = "serial"
    fused = "fused"


E4B = "google/gemma-4-E4B-it"

_ADAPTER = "Sidecar GGUF, checkpoint directory, or a repository of the hub"
_INJECT = (
    "Let one token go wrong in the reference: skip-write, lost-source or shift-counter. Then it holds when the fault is"
    " found where it is."
)

Prompts = Annotated[
    list[str] | None, typer.Argument(metavar="[PROMPT]...", help="A user's turn each; none: the lines of stdin.")
]
Base = Annotated[
    str,
    typer.Option(
        "--base", help="Directory in Hugging Face's form, a repository of its hub, or a GGUF.", callback=base_name
    ),
]
Adapter = Annotated[str, typer.Option("--adapter", help=f"{_ADAPTER}.")]
OptionalAdapter = Annotated[str | None, typer.Option("--adapter", help=f"{_ADAPTER}; without it the base runs.")]
Config = Annotated[str | None, typer.Option(help="Another config file of a checkpoint directory.")]
Load = Annotated[
    Path | None, typer.Option(help="Start on the memory of a file, of the server's memory-save or --save.")
]
Save = Annotated[Path | None, typer.Option(help="Write the memory there afterwards; the server reads it.")]
DtypeOf = Annotated[Dtype, typer.Option("--dtype", help="Of the base; the memory is always float32.")]
GeluOf = Annotated[Gelu, typer.Option("--gelu", help="ggml: through fp16, as llama.cpp's CPU build has it.")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", min=1, help="New tokens of an answer, at most.")]
Script = Annotated[Path | None, typer.Option(help="A llamamem_conversation.v1; without it the standard conversation.")]
ExactGelu = Annotated[bool, typer.Option("--exact-gelu", help="Run the server on the test build's exact GELU.")]
EveryToken = Annotated[
    bool, typer.Option("--every-token", help="Look at the memories after every token too; --inject implies it.")
]
Inject = Annotated[str | None, typer.Option(metavar="KIND:LAYER:TOKEN", help=_INJECT)]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


def register(app: typer.Typer) -> None:
    group = typer.Typer(help="The memory in PyTorch, on Hugging Face's Gemma 4.", no_args_is_help=True)
    group.command("run")(run)
    group.command("trace")(trace)
    group.command("parity")(parity)
    app.add_typer(group, name="reference")


def run(
    prompts: Prompts = None,
    base: Base = E4B,
    adapter: OptionalAdapter = None,
    config: Config = None,
    load: Load = None,
    save: Save = None,
    frozen: Annotated[bool, typer.Option("--frozen", help="The memory is read and not written to.")] = False,
    scale: Annotated[float, typer.Option(help="A factor of the deltas; 0 is the base.")] = 1.0,
    max_tokens: MaxTokens = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Choose among so many; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Choose among the likeliest of this total.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the choices.")] = 0,
    dtype: DtypeOf = Dtype.float32,
    gelu: GeluOf = Gelu.exact,
    as_json: Json = False,
) -> None:
    """Talk to the reference, turn after turn; KV cache and memory go on together.

    --load and --save want a sidecar as --adapter, because a memory file belongs to one.

    Exit status: 0 done, 2 it could not be run.
    """
    require_torch("llamamem reference")
    from llamamem.reference.conversation import sampler
    from llamamem.reference.talk import open_reference, talk

    if adapter is None and (load or save or frozen or scale != 1.0):
        raise LlamamemError("--load, --save, --frozen and --scale are of a memory; give --adapter")
    opened, memory = open_reference(base, adapter, config=config, dtype=dtype.value, gelu=gelu.value)
    if memory is not None:
        memory.frozen, memory.scale = frozen, scale

    def show(said: Said) -> None:
        if not as_json:
            counts = f"{said.prompt_tokens} + {said.new_tokens} tokens, {said.tokens_written} written to the memory"
            print(said.answer, flush=True)
            typer.echo(f"[{counts}]", err=True)

    lines = (line.rstrip("\n") for line in sys.stdin)
    turns = prompts or (line for line in lines if line)
    choose = sampler(temperature, top_k, top_p, seed)
    found = talk(opened, memory, turns, max_new_tokens=max_tokens, choose=choose, load=load, save=save, show=show)
    if as_json:
        about = {"base": opened.name, "adapter": adapter, "saved": None if save is None else str(save)}
        print(json.dumps({**about, "turns": [said.as_json() for said in found]}))


def trace(
    prompt: Annotated[str, typer.Argument(help="A user's turn.")],
    output: Annotated[Path, typer.Option(help="File to write.")],
    adapter: Adapter,
    base: Base = E4B,
    config: Config = None,
    max_tokens: MaxTokens = 64,
    top: Annotated[int, typer.Option(min=1, help="Next tokens to note the logits of, at every token.")] = 5,
    dtype: DtypeOf = Dtype.float32,
    gelu: GeluOf = Gelu.exact,
) -> None:
    """Record what the reference answers to a prompt, and what its memory does at every token.

    The file is a delta_mem_rwkv_ms_reference_trace.v1; `llamamem trace compare` and `llamamem health --trace` take it.

    Exit status: 0 done, 2 it could not be run.
    """
    require_torch("llamamem reference")
    from llamamem.formats.outputs import write_json
    from llamamem.reference.talk import open_reference
    from llamamem.reference.trace import record_trace

    opened, memory = open_reference(base, adapter, config=config, dtype=dtype.value, gelu=gelu.value)
    assert memory is not None
    found = record_trace(opened, memory, prompt, max_tokens, top=top, adapter=adapter)
    write_json(output, found)
    print(found["result"]["assistant_display"])
    typer.echo(f"{len(found['steps'])} tokens -> {output}", err=True)


def parity(
    base: Annotated[str, typer.Option(help="The base in Hugging Face's form, or a GGUF.", callback=base_name)],
    model: Annotated[Path, typer.Option(help="The same base as GGUF.", callback=base_file)],
    sidecar: Annotated[Path, typer.Option(help="Memory sidecar GGUF, for both.")],
    script: Script = None,
    profile: Annotated[Profile, typer.Option(help="Of the server.")] = Profile.serial,
    ctx_size: Annotated[int, typer.Option(min=1, help="Of the server, in tokens.")] = 4096,
    exact_gelu: ExactGelu = False,
    logits: Annotated[float | None, typer.Option(help="Bound on differences of log-probabilities.")] = None,
    state: Annotated[float | None, typer.Option(help="Bound on differences of the memory's values.")] = None,
    every_token: EveryToken = False,
    inject: Inject = None,
    dtype: DtypeOf = Dtype.float32,
    bin_dir: Annotated[Path | None, typer.Option(help="A build made elsewhere.")] = None,
    as_json: Json = False,
) -> None:
    """Hold one conversation with the reference and with llama-server, and compare tokens, logits and memories.

    The standard conversation has turns, resets, memories saved and resumed, a slot saved and restored, and more tokens
    than a chunk. Each side resumes the memory file that the other one wrote. Where they part, layer and token are
    named.

    Exit status: 0 they agree, 1 they do not, 2 it could not be run.
    """
    require_torch("llamamem reference")
    from llamamem.formats.conversation import read_script
    from llamamem.proof.conversation import hold
    from llamamem.proof.conversation_report import Bounds
    from llamamem.reference.attach import Fault

    found = hold(
        base,
        model,
        sidecar,
        script=None if script is None else read_script(script),
        profile=profile.value,
        ctx_size=ctx_size,
        exact_gelu=exact_gelu,
        dtype=dtype.value,
        bounds=Bounds.of(exact_gelu, logits, state),
        every_token=every_token or inject is not None,
        inject=None if inject is None else Fault.parse(inject),
        bin_dir=bin_dir,
        show=(lambda turn: None) if as_json else _show,
    )
    print(json.dumps(found.as_json()) if as_json else found.summary)
    raise typer.Exit(0 if found.holds else 1)


def _show(turn: Turn) -> None:
    what = turn.what if len(turn.what) <= 36 else f"{turn.what[:33]}..."
    tokens = f"{turn.prompt_tokens:4} + {turn.new_tokens:<3}" if turn.new_tokens else " " * 10
    far = f"logits {turn.logits:.1e}" if turn.new_tokens else " " * 14
    memory = f"S {turn.S:.1e}  prev {turn.prev:.1e}  {turn.written} written"
    print(f"{'ok' if turn.ok else 'NO'}  {turn.step:3} {what:36} {tokens} {far}  {memory}", flush=True)
