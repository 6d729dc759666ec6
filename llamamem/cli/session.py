"""`llamamem session`: memories of conversations by name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import platformdirs
import typer

from llamamem.cli.completion import run_names, session_names
from llamamem.errors import LlamamemError
from llamamem.sessions import Session, Sessions, SessionStore, open_store

Store = Annotated[
    str | None,
    typer.Option(
        metavar="DIR|sqlite:FILE", envvar="LLAMAMEM_SESSIONS", help="Where sessions are kept; else in the user's data."
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
Url = Annotated[str | None, typer.Option(help="A server that `llamamem serve` did not start; with --slot-dir.")]
SlotDir = Annotated[Path | None, typer.Option(help="That server's --slot-save-path.")]
ApiKey = Annotated[str | None, typer.Option(envvar="LLAMA_API_KEY", help="Key that the server asks for.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

_SIZES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
_AGES = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def register(app: typer.Typer) -> None:
    group = typer.Typer(
        help="Memories of conversations by name: started, resumed in a slot of a server, saved, listed, removed.",
        no_args_is_help=True,
    )
    group.command("start")(start)
    group.command("resume")(resume)
    group.command("save")(save)
    group.command("list")(list_sessions)
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
    as_json: Json = False,
) -> None:
    """Make a session, with no memory yet or with that of another.

    Exit status: 0 done, 2 it could not be done.
    """
    _report(open_given_store(store, quota).create(name, from_), "started", as_json)


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
    with _sessions(open_given_store(store), run, url, slot_dir, api_key) as sessions:
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

    Exit status: 0 saved, 1 another writer saved the session since it was resumed, 2 it could not be done.
    """
    with _sessions(open_given_store(store, quota), run, url, slot_dir, api_key) as sessions:
        _report(sessions.save(name, slot, force=force), f"saved from slot {slot}", as_json)


def list_sessions(store: Store = None, as_json: Json = False) -> None:
    """List the sessions.

    Exit status: 0 all are whole, 1 some are damaged, 2 the store cannot be read.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    opened = open_given_store(store)
    entries = opened.entries()
    if as_json:
        sessions = [
            {"label": e.label, "fault": e.fault, **(e.session.model_dump(mode="json") if e.session else {})}
            for e in entries
        ]
        print(json.dumps({"store": opened.location, "total_bytes": opened.total_bytes(), "sessions": sessions}))
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
    if any(e.fault for e in entries):
        raise typer.Exit(1)


def remove(
    names: Annotated[
        list[str], typer.Argument(metavar="NAME...", help="Sessions, damaged ones too.", autocompletion=session_names)
    ],
    store: Store = None,
) -> None:
    """Remove sessions.

    Exit status: 0 done, 2 it could not be done.
    """
    opened = open_given_store(store)
    for name in names:
        opened.remove(name)
        typer.echo(f"removed {name!r}", err=True)


def prune(
    older_than: Annotated[str, typer.Option(metavar="AGE", help="Not used for that long: 90m, 12h, 30d, 8w.")],
    store: Store = None,
    as_json: Json = False,
) -> None:
    """Remove what was not used for a while; what is damaged stays. Prints the names.

    Exit status: 0 done, 2 it could not be done.
    """
    removed = open_given_store(store).prune(_age(older_than))
    if as_json:
        print(json.dumps({"removed": removed}))
    else:
        for name in removed:
            print(name)


def open_given_store(store: str | None, quota: str | None = None) -> SessionStore:
    """The store of --store, else the one in the user's data."""
    place = store or str(Path(platformdirs.user_data_path("llamamem", appauthor=False)) / "sessions")
    return open_store(place, quota=None if quota is None else _size(quota))


@contextmanager
def _sessions(
    store: SessionStore, run: str | None, url: str | None, slot_dir: Path | None, api_key: str | None
) -> Iterator[Sessions]:
    from llamamem.serving.target import open_target

    client, record = open_target(run, url, api_key)
    with client:
        directory = slot_dir or (record.slot_dir if record else None)
        if directory is None:
            raise LlamamemError(f"{client.url}: its slot directory is not known; give --slot-dir")
        yield Sessions(client, store, directory, run_id=record.run_id if record else None)


def _report(session: Session, done: str, as_json: bool) -> None:
    if as_json:
        print(session.model_dump_json())
    else:
        typer.echo(f"{session.name!r} {done}: generation {session.generation}, {session.tokens} tokens", err=True)


def _size(text: str) -> int:
    if match := re.fullmatch(r"(\d{1,12})([kmg]?)b?", text.strip().lower()):
        return int(match[1]) * _SIZES[match[2]]
    raise LlamamemError(f"--quota {text}: give bytes, or a number with k, M or G")


def _age(text: str) -> timedelta:
    if match := re.fullmatch(r"(\d{1,5})([mhdw])", text.strip().lower()):
        return timedelta(**{_AGES[match[2]]: int(match[1])})
    raise LlamamemError(f"--older-than {text}: give a number with m, h, d or w, as in 30d")
