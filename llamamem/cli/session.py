"""`llamamem session`: memories of conversations by name."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import platformdirs
import typer

from llamamem.cli.completion import run_names, session_names
from llamamem.cli.rebase import rebase_sessions
from llamamem.errors import LlamamemError
from llamamem.sessions import Session, Sessions, SessionStore, open_store
from llamamem.sessions.remote import GatewaySessions
from llamamem.sessions.resumed import release, sweep
from llamamem.sessions.session import Generation

PLACES = "STORE"  # DIR, sqlite:FILE, valkey://HOST, postgresql://HOST/DATABASE

Store = Annotated[
    str | None,
    typer.Option(
        metavar=PLACES,
        envvar="LLAMAMEM_SESSIONS",
        help="DIR, sqlite:FILE, valkey:// or postgresql://; else in the user's data.",
    ),
]
Quota = Annotated[
    str | None,
    typer.Option(metavar="SIZE", envvar="LLAMAMEM_SESSIONS_QUOTA", help="Refuse to keep more states: 500k, 20M, 1G."),
]
Name = Annotated[str, typer.Argument(metavar="NAME", help="Any text that can be printed, up to 200 characters.")]
Slot = Annotated[int, typer.Option(min=0, help="Slot of the server, counted from 0.")]
OldName = Annotated[
    str,
    typer.Argument(metavar="NAME", help="A session of the store.", autocompletion=session_names, show_default=False),
]
Run = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Which server, when several run: its name or run id.", autocompletion=run_names),
]
Url = Annotated[str | None, typer.Option(help="A server that `llamamem serve` did not start.")]
GatewayUrl = Annotated[
    str | None, typer.Option("--url", metavar="URL", help="A gateway, whose sessions are meant in place of a store's.")
]
SlotDir = Annotated[Path | None, typer.Option(help="That server's --slot-save-path; not needed any more.")]
ApiKey = Annotated[str | None, typer.Option(envvar="LLAMA_API_KEY", help="Key that the server asks for.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

_SIZES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
_AGES = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def register(app: typer.Typer) -> None:
    group = typer.Typer(
        help="Memories of conversations by name: started, resumed in a slot, saved, brought back, listed, removed.",
        no_args_is_help=True,
    )
    group.command("start")(start)
    group.command("resume")(resume)
    group.command("save")(save)
    group.command("list")(list_sessions)
    group.command("history")(history)
    group.command("undo")(undo)
    group.command("rebase")(rebase_sessions)
    group.command("rm")(remove)
    group.command("prune")(prune)
    app.add_typer(group, name="session")


def start(
    name: Name,
    from_: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="OTHER",
            help="Begin with a copy of that session's memory.",
            autocompletion=session_names,
        ),
    ] = None,
    store: Store = None,
    quota: Quota = None,
    url: GatewayUrl = None,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """Make a session, with no memory yet or with that of another. A gateway makes one with its first memory.

    Exit status: 0 done, 2 it could not be done.
    """
    with _opened(store, url, api_key, quota=quota) as opened:
        _report(opened.create(name, from_), "started", as_json)


def resume(
    name: OldName,
    slot: Slot,
    run: Run = None,
    url: Url = None,
    slot_dir: SlotDir = None,
    api_key: ApiKey = None,
    store: Store = None,
    as_json: Json = False,
) -> None:
    """Put a session's memory into a slot, whose text is dropped: the next one starts on what is remembered.

    Exit status: 0 done, 2 it could not be done.
    """
    with _sessions(open_given_store(store), run, url, api_key) as sessions:
        _report(sessions.resume(name, slot), f"resumed in slot {slot}", as_json)


def save(
    name: OldName,
    slot: Slot,
    force: Annotated[bool, typer.Option("--force", help="Whatever the slot holds and whoever saved since.")] = False,
    run: Run = None,
    url: Url = None,
    slot_dir: SlotDir = None,
    api_key: ApiKey = None,
    store: Store = None,
    quota: Quota = None,
    as_json: Json = False,
) -> None:
    """Keep the memory of a slot as the next generation of the session that was resumed in it.

    What does not go on from there is refused: a slot that was reset or given another memory since, a new chat in it
    after the last save, a server that started again. The generation before is kept: `llamamem session undo`.

    Exit status: 0 saved, 1 another writer saved the session since it was resumed, 2 it could not be done.
    """
    with _sessions(open_given_store(store, quota), run, url, api_key) as sessions:
        _report(sessions.save(name, slot, force=force), f"saved from slot {slot}", as_json)


def list_sessions(
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="A page: so many, in the store's order.")
    ] = None,
    after: Annotated[str | None, typer.Option(metavar="NAME", help="The page after that one.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read every state, and compare it with its hash.")] = False,
    store: Store = None,
    url: GatewayUrl = None,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """List the sessions, all of them by name or a page. What is damaged is listed with its fault.

    Without --verify states are not read: one that is missing or of another length is found, other bytes are not.

    Exit status: 0 all are whole, 1 some are damaged, 2 the store cannot be read.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    with _opened(store, url, api_key, must_exist=True) as opened:
        entries = opened.entries(after=after, limit=limit, verify=verify)
        total = opened.total_bytes() if as_json else 0
    more = entries[-1].label if limit is not None and len(entries) == limit else None
    if as_json:
        sessions = [
            {"label": e.label, "fault": e.fault, **(e.session.model_dump(mode="json") if e.session else {})}
            for e in entries
        ]
        print(json.dumps({"store": opened.location, "total_bytes": total, "next": more, "sessions": sessions}))
    elif entries:
        table = Table("name", "tokens", "used (UTC)", "generation", "sidecar", "from", "", box=None, pad_edge=False)
        for e in entries:
            cells = [""] * 5
            if (s := e.session) is not None:
                used, sidecar = f"{s.used:%Y-%m-%d %H:%M}", (s.sidecar_sha256 or "-")[:12]
                cells = [str(s.tokens), used, str(s.generation), sidecar, s.parent or "-"]
            table.add_row(*map(escape, [e.label, *cells, e.fault or ""]))
        console = Console(highlight=False)
        if not console.is_terminal:
            console.width = 10_000  # one line a session, for whoever reads on
        console.print(table)
        if more is not None:
            typer.echo(f"the next page: --limit {limit} --after {shlex.quote(more)}", err=True)
    elif after is None:
        typer.echo(f"no sessions in {opened.location}; `llamamem session start NAME` makes one", err=True)
    if any(e.fault for e in entries):
        raise typer.Exit(1)


def history(
    name: OldName, store: Store = None, url: GatewayUrl = None, api_key: ApiKey = None, as_json: Json = False
) -> None:
    """Show the generations of a session that are kept, the newest first.

    Exit status: 0 shown, 2 it could not be.
    """
    with _opened(store, url, api_key) as opened:
        session, _ = opened.load(name)
    kept = [session, *([session.before] if session.before else [])]
    if as_json:
        fields = set(Generation.model_fields)
        generations = [generation.model_dump(mode="json", include=fields) for generation in kept]
        print(json.dumps({"name": session.name, "generations": generations}))
        return
    for generation in kept:
        saved = f"{generation.saved:%Y-%m-%d %H:%M} UTC" if generation.saved else "-"
        print(f"generation {generation.generation}  saved {saved}  {generation.tokens} tokens")


def undo(
    name: OldName, store: Store = None, url: GatewayUrl = None, api_key: ApiKey = None, as_json: Json = False
) -> None:
    """Bring back the generation before, as the next one; undone once more, all is as it was.

    Exit status: 0 done, 2 it could not be done.
    """
    with _opened(store, url, api_key) as opened:
        _report(opened.undo(name), "is as it was before its last save", as_json)


def remove(
    names: Annotated[
        list[str], typer.Argument(metavar="NAME...", help="Sessions, damaged ones too.", autocompletion=session_names)
    ],
    keep_slot: Annotated[bool, typer.Option("--keep-slot", help="Leave the slots in which they were resumed.")] = False,
    slot_dir: Annotated[Path | None, typer.Option(help="Also sweep what killed processes left there.")] = None,
    api_key: ApiKey = None,
    store: Store = None,
    url: GatewayUrl = None,
) -> None:
    """Remove sessions, and every copy of their memory: older generations, the slots in which they were resumed.

    Exit status: 0 done, 2 it could not be done.
    """
    with _opened(store, url, api_key) as opened:
        for name in names:
            opened.remove(name)
            typer.echo(f"removed {name!r}", err=True)
            key = api_key.split(",")[0] if api_key else None
            for left in release(opened.location, name, api_key=key, keep_slot=keep_slot):
                typer.echo(f"llamamem: warning: {left}", err=True)
    sweep(slot_dir)


def prune(
    older_than: Annotated[str, typer.Option(metavar="AGE", help="Not used for that long: 90m, 12h, 30d, 8w.")],
    store: Store = None,
    as_json: Json = False,
) -> None:
    """Remove what was not used for a while; what is damaged stays, and so do slots. Prints the names.

    Exit status: 0 done, 2 it could not be done.
    """
    opened = open_given_store(store, must_exist=True)
    removed = opened.prune(_age(older_than))
    for name in removed:
        release(opened.location, name, keep_slot=True)
    sweep()
    if as_json:
        print(json.dumps({"removed": removed}))
    else:
        for name in removed:
            print(name)


def open_given_store(store: str | None, quota: str | None = None, *, must_exist: bool = False) -> SessionStore:
    """The store of --store, else the one in the user's data.

    `must_exist`: one that was named and is not there is a mistake in its name, not a store without sessions.
    """
    file = Path(store.removeprefix("sqlite:")).expanduser() if store and "://" not in store else None
    if must_exist and file is not None and not file.exists():
        raise LlamamemError(f"--store {store}: no such store; check the name, `llamamem session start` makes one")
    place = store or str(Path(platformdirs.user_data_path("llamamem", appauthor=False)) / "sessions")
    return open_store(place, quota=None if quota is None else size_of(quota, "--quota"))


@contextmanager
def _opened(
    store: str | None, url: str | None, api_key: str | None, *, quota: str | None = None, must_exist: bool = False
) -> Iterator[SessionStore | GatewaySessions]:
    """The sessions of a gateway where its URL is given, else those of a store."""
    if url is None:
        yield open_given_store(store, quota, must_exist=must_exist)
        return
    from llamamem.serving.target import open_target

    client, _ = open_target(None, url, api_key)
    with client:
        yield GatewaySessions(client)


@contextmanager
def _sessions(store: SessionStore, run: str | None, url: str | None, api_key: str | None) -> Iterator[Sessions]:
    from llamamem.serving.target import open_target

    client, record = open_target(run, url, api_key)
    with client:
        yield Sessions(client, store, run_id=record.run_id if record else None)


def _report(session: Session, done: str, as_json: bool) -> None:
    if as_json:
        print(session.model_dump_json())
    else:
        typer.echo(f"{session.name!r} {done}: generation {session.generation}, {session.tokens} tokens", err=True)


def size_of(text: str, option: str) -> int:
    if match := re.fullmatch(r"(\d{1,12})([kmg]?)b?", text.strip().lower()):
        return int(match[1]) * _SIZES[match[2]]
    raise LlamamemError(f"{option} {text}: give bytes, or a number with k, M or G")


def _age(text: str) -> timedelta:
    if match := re.fullmatch(r"(\d{1,5})([mhdw])", text.strip().lower()):
        return timedelta(**{_AGES[match[2]]: int(match[1])})
    raise LlamamemError(f"--older-than {text}: give a number with m, h, d or w, as in 30d")
