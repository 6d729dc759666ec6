"""`llamamem chat`: talk to a running server in the terminal, or have it read a script."""

from __future__ import annotations

import contextlib
import io
import sys
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from llamamem.cli.completion import session_names
from llamamem.cli.session import ApiKey, Quota, Run, SlotDir, Store, Url, open_given_store
from llamamem.errors import LlamamemError

if TYPE_CHECKING:
    from llamamem.sessions import Chat

HELP = """\
/memory              what is remembered: whose memory, tokens written, the norm of each layer's state
/save [NAME]         keep the memory as a session; without NAME, as the one that was loaded or saved last
/save --force NAME   over whatever that session is now
/load NAME           drop the text and go on with the memory of a session
/reset               forget all: the text and the memory; what was saved stays
/help                this
/quit                end, as Ctrl-D does
Ctrl-C interrupts an answer; what was said until then stays said. // at the start of a line sends a text that begins
with one /."""


def register(app: typer.Typer) -> None:
    app.command("chat")(chat_command)


def chat_command(
    run: Run = None,
    session: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Begin with the memory of this session, as /load does.", autocompletion=session_names
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System prompt.")] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="0 is greedy; the server's own unless given.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the sampling; another each time unless given.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Cut an answer after so many.")] = None,
    slot: Annotated[
        int | None, typer.Option(min=0, help="Slot to be answered in, counted from 0; the server chooses unless given.")
    ] = None,
    url: Url = None,
    slot_dir: SlotDir = None,
    api_key: ApiKey = None,
    store: Store = None,
    quota: Quota = None,
) -> None:
    """Talk to a running server. It begins with an empty memory, or with that of --session.

    With a gateway (`llamamem serve --sessions`) sessions are those that the key opens there, unless --store is given.

    The memory goes with each request and comes back with the answer: no slot is taken, nobody else gets it, and nothing
    is left in the server when the chat ends.

    Type /help for the commands: /memory, /save NAME, /load NAME, /reset, /quit. Ctrl-C interrupts an answer, Ctrl-D
    ends. Nothing is kept unless it is saved. When input is not a terminal it is a script: a line is a message or a
    command, answers go to standard output, and the first line that fails ends it.

    Exit status: 0 it ended, 2 it could not be run or a line of the script failed, 130 a script was interrupted.
    """
    from llamamem.serving.target import open_target
    from llamamem.sessions import Chat, Sessions
    from llamamem.sessions.remote import GatewaySessions, is_gateway

    client, record = open_target(run, url, api_key)
    with client:
        own = is_gateway(client) and store is None
        sessions = Sessions(client, GatewaySessions(client) if own else open_given_store(store, quota))
        sampling = {"temperature": temperature, "top_k": None, "seed": seed, "max_tokens": max_tokens}
        chat = Chat(client, slot=slot, sessions=sessions, system=system, **sampling)
        if session is not None:
            chat.load(session)
        for stream in (sys.stdin, sys.stdout):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")
        if sys.stdin.isatty():
            where = f"{record.name} at {client.url}" if record else str(client.url)
            _note(f"llamamem: {where}, {_whose(chat)}; /help names the commands, Ctrl-D ends")
            _converse(chat)
        else:
            _read_script(chat)


def _converse(chat: Chat) -> None:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (input() edits lines and remembers them with it)
    while True:
        try:
            line = _typed(f"{chat.session.name}> " if chat.session else "> ")
            if not _do(chat, line):
                return
        except EOFError:
            _note("")
            return
        except KeyboardInterrupt:
            _note("\n(interrupted; Ctrl-D ends)")
        except LlamamemError as e:
            _note(f"llamamem: error: {e}")


def _read_script(chat: Chat) -> None:
    try:
        for number, line in enumerate(sys.stdin, 1):
            try:
                if not _do(chat, line.rstrip("\r\n")):
                    return
            except LlamamemError as e:
                raise LlamamemError(f"line {number}: {e}", exit_status=e.exit_status, reason=e.reason) from e
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _do(chat: Chat, line: str) -> bool:
    """One line; False when it was the last."""
    if line.startswith("//"):
        _answer(chat, line[1:])
    elif line.startswith("/"):
        return _command(chat, *line[1:].split(maxsplit=1))
    elif line.strip():
        _answer(chat, line)
    return True


def _command(chat: Chat, command: str = "", argument: str = "") -> bool:
    argument = argument.strip()
    if command in ("save", "load"):
        _save_or_load(chat, command, argument)
    elif argument or command not in ("memory", "reset", "help", "quit"):
        given = f"{command} {argument}".strip()
        raise LlamamemError(f"/{given}: not a command; /help names them, // sends a text that begins with /")
    elif command == "memory":
        _show_memory(chat)
    elif command == "reset":
        chat.reset()
        _note("the text and the memory are forgotten")
    elif command == "help":
        print(HELP, flush=True)
    return command != "quit"


def _save_or_load(chat: Chat, command: str, argument: str) -> None:
    force = command == "save" and argument.split(maxsplit=1)[:1] == ["--force"]
    name = argument.removeprefix("--force").strip() if force else argument
    if not name and command == "save" and chat.session is not None:
        name = chat.session.name
    if not name:
        raise LlamamemError(f"/{command}: which session? give a name, as in /{command} anna")
    session = chat.save(name, force=force) if command == "save" else chat.load(name)
    done = "saved" if command == "save" else "loaded"
    _note(f"{session.name!r} {done}: generation {session.generation}, {session.tokens} tokens")


def _show_memory(chat: Chat) -> None:
    memory = chat.memory()
    print(f"{memory.tokens_written} tokens written; {_whose(chat)}")
    print("norm by layer:", "  ".join(f"{i}: {norm:.3g}" for i, norm in zip(memory.layers, memory.norms, strict=True)))
    sys.stdout.flush()


def _whose(chat: Chat) -> str:
    if not chat.has_memory:
        return "without a memory"
    if chat.session is None:
        return "on a memory of its own, which was empty"
    return f"on the memory of session {chat.session.name!r}, generation {chat.session.generation}"


def _answer(chat: Chat, text: str) -> None:
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    thought, begun, reason = False, False, None
    with contextlib.closing(chat.ask(text)) as answer:
        try:
            for delta in answer:
                if delta.reasoning and console.is_terminal:
                    console.print(escape(_shown(delta.reasoning)), style="dim", end="")
                    thought = True
                if delta.text:
                    if thought and not begun:
                        console.print()
                    begun = True
                    sys.stdout.write(_shown(delta.text) if sys.stdout.isatty() else delta.text)
                    sys.stdout.flush()
                reason = delta.finish_reason or reason
        finally:
            if begun:
                print(flush=True)
    if reason == "length" and chat.options["max_tokens"] is None:
        _note("(cut: the context is full; after /save NAME, /load NAME goes on with the memory and without the text)")


def _shown(text: str) -> str:
    """What a model says must not steer the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "·" for c in text)


def _typed(prompt: str) -> str:
    if sys.stdout.isatty():
        return input(prompt)
    sys.stderr.write(prompt)
    sys.stderr.flush()
    return input()


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
