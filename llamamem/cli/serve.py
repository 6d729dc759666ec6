"""`llamamem serve`: start a server in the foreground, wait until it is ready, stop it in order."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from llamamem.cli.base import base_file
from llamamem.cli.completion import profile_names
from llamamem.cli.session import PLACES, Quota
from llamamem.errors import LlamamemError
from llamamem.formats.demo_files import demo_files
from llamamem.formats.run import RunRecord, state_dir
from llamamem.native.build import Build, find_build
from llamamem.serving.digests import file_sha256
from llamamem.serving.foreground import STOPPED, Signals, StopRequested, serve_foreground
from llamamem.serving.machine import processors
from llamamem.serving.preflight import Checked, check
from llamamem.serving.profiles import PAGE, Plan, make_plan


def register(app: typer.Typer) -> None:
    # what follows `--` is left in context.args
    app.command("serve", context_settings={"allow_extra_args": True})(serve)


def serve(
    context: typer.Context,
    model: Annotated[
        Path | None, typer.Option(help="Base GGUF, or a name that `llamamem pull` knows.", callback=base_file)
    ] = None,
    sidecar: Annotated[Path | None, typer.Option(help="Sidecar GGUF; without one the base is served alone.")] = None,
    demo: Annotated[bool, typer.Option("--demo", help="The small model of `llamamem demo`, with its memory.")] = False,
    profile: Annotated[
        str | None,
        typer.Option(help="serial (default with a sidecar), fused, batched or base.", autocompletion=profile_names),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="What `ps`, `logs`, `stop` and --run call this run; its run id unless given.")
    ] = None,
    parallel: Annotated[int | None, typer.Option(help="Slots; batched: 4 unless given.")] = None,
    ctx_size: Annotated[int | None, typer.Option(help="Tokens of context; 0: the model's own.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0: a free one.")] = 8080,
    slot_dir: Annotated[Path | None, typer.Option(help="Directory of slot files.")] = None,
    bin_dir: Annotated[Path | None, typer.Option(help="Directory of a build made elsewhere.")] = None,
    stall_timeout: Annotated[
        float, typer.Option(help="Give up after this many seconds without a line of log.")
    ] = 300.0,
    grace: Annotated[float, typer.Option(help="Seconds between SIGTERM and SIGKILL.")] = 10.0,
    memory_check: Annotated[
        bool, typer.Option("--memory-check/--no-memory-check", help="Refuse if it cannot fit.")
    ] = True,
    sessions: Annotated[
        str | None,
        typer.Option(metavar=PLACES, help="Put a gateway in front, with memories by name from this store."),
    ] = None,
    quota: Quota = None,
    session_header: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A header that names a session, beside those of the docs.")
    ] = None,
    conversation_header: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Likewise, a conversation of it.")
    ] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(metavar="URL", help="Web pages that may ask the gateway; none unless given.")
    ] = None,
    lease: Annotated[
        float, typer.Option(min=1, help="Seconds that a request waits for another gateway at its session.")
    ] = 60.0,
    max_body: Annotated[str, typer.Option(metavar="SIZE", help="Of a request to the gateway.")] = "32M",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and start nothing.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object: the plan, or the run once it is ready.")
    ] = False,
) -> None:
    """Serve a base GGUF, with a memory or without, until Ctrl-C. Arguments after -- go to llama-server.

    With --sessions a gateway is on the port, and the server behind it on one of its own: any OpenAI or Anthropic client
    has memories by name, as docs/service.md says.

    Exit status: 0 stopped on request, 1 the server ended by itself, 2 it could not start, 3 it had to be killed.
    """
    if demo and (model or sidecar):
        raise LlamamemError("--demo brings its own model and sidecar; leave --model and --sidecar out")
    if demo:
        files = demo_files()
        model, sidecar = files.model, files.sidecar
    if model is None:
        raise LlamamemError("--model is missing; give a base GGUF, or --demo for the small model of `llamamem demo`")
    front = None
    if sessions is not None:
        from llamamem.cli.gateway import prepare

        given = (session_header, conversation_header, cors_origin, lease, max_body)
        front = prepare(sessions, quota, sidecar, host, port, context.args, given, dry_run)
        host, port, profile = "127.0.0.1", 0, profile or "batched"
    elif session_header or conversation_header or cors_origin or quota:
        raise LlamamemError("these options are for a gateway; give --sessions STORE, or leave them out")
    if sidecar is not None and slot_dir is None and front is None:
        slot_dir = state_dir() / "slots" / _slot_dir_name(sidecar)
    build = find_build(bin_dir=bin_dir)
    plan = make_plan(
        model.absolute(),
        bin_dir=build.bin_dir,
        sidecar=sidecar.absolute() if sidecar else None,
        profile=profile,
        parallel=parallel,
        ctx_size=ctx_size,
        host=host,
        port=port,
        slot_dir=slot_dir.absolute() if slot_dir else None,
        threads=ours.usable if (ours := processors()).limit else None,
        page=PAGE,
        extra=context.args,
    )
    if dry_run:
        _print_plan(plan, as_json)
        return

    def on_ready(record: RunRecord) -> None:
        if as_json:
            print(record.model_dump_json(), flush=True)
        else:
            memory = f"memory {record.profile}" if record.sidecar else "no memory"
            memory += f", sessions in {front.store.location}" if front else ""
            url = record.gateway or record.url
            print(f"llamamem: ready at {url} ({memory}); log {record.log}", file=sys.stderr, flush=True)

    with Signals() as signals:
        try:
            checked = _check(plan, build, memory_check, signals)
        except StopRequested:
            print("llamamem: stopped on request, before the server was started", file=sys.stderr)
            raise typer.Exit(STOPPED) from None
        options: dict[str, Any] = {"build": build.identity, "name": name, "stall_timeout": stall_timeout}
        options |= {"grace": grace, "on_ready": on_ready}
        if front is None:
            status = serve_foreground(plan, checked, signals, **options)
        else:
            status = front.serve(plan, checked, signals, **options)
    raise typer.Exit(status)


def _slot_dir_name(sidecar: Path) -> str:
    """Of its own for each sidecar: two of one file name would write into each other's files."""
    try:
        return f"{sidecar.stem}-{file_sha256(sidecar)[:8]}"
    except LlamamemError:  # preflight says what is wrong with it
        return sidecar.stem


def _check(plan: Plan, build: Build, memory_check: bool, signals: Signals) -> Checked:
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("hashing the base", total=None, visible=False)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, visible=True)
            signals.check()

        checked = check(plan, memory_check=memory_check, on_cpu=build.backend == "cpu", progress=progress)
    for warning in checked.warnings:
        console.print(f"llamamem: warning: {warning}", style="yellow", highlight=False, soft_wrap=True, markup=False)
    return checked


def _print_plan(plan: Plan, as_json: bool) -> None:
    fields = plan.as_dict()
    if as_json:
        print(json.dumps(fields))
        return
    print(shlex.join(fields["argv"]))
    for name, value in fields["env"].items():
        print(f"  environment  {name}={value}")
    for name in ("profile", "model", "sidecar", "slot_dir", "parallel", "ctx_size"):
        print(f"  {name:<11}  {fields[name] if fields[name] is not None else '-'}")
