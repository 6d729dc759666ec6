"""Places of stores to be checked: each kind on its own disk or server, and a wire to the server that can be cut."""

from __future__ import annotations

import contextlib
import os
import random
import select
import socket
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from store_servers import RAM, Server, emptied, free_port, postgres_server, redis_server

from llamamem.sessions import Memory, SessionStore, open_store

KINDS = ("directory", "sqlite", "valkey", "postgres")


class Place:
    """A store that is empty at first. `open()` is another connection to it each time."""

    def __init__(self, kind: str, url: str, server: Server | None = None) -> None:
        self.kind = kind
        self.url = url
        self.server = server

    def open(self, *, quota: int | None = None) -> SessionStore:
        return open_store(self.url, quota=quota)


@contextlib.contextmanager
def place_of(kind: str, servers: Callable[[str], Server] | None = None) -> Iterator[Place]:
    """`servers` gives running ones, which are emptied; else one is started."""
    within = RAM if os.access(RAM, os.W_OK) else None
    if kind in ("directory", "sqlite"):
        with tempfile.TemporaryDirectory(prefix="llamamem-place-", dir=within) as folder:
            yield Place(kind, f"{folder}/store" if kind == "directory" else f"sqlite:{folder}/store.db")
        return
    with contextlib.ExitStack() as stack:
        start = redis_server if kind == "valkey" else postgres_server
        server = servers(kind) if servers is not None else stack.enter_context(start(within=within))
        emptied(server.url)
        yield Place(kind, server.url, server)


def memory(tokens: int, size: int = 6700) -> Memory:
    """Bytes that tell what they are: another memory for each number of tokens."""
    return Memory((b"%08d" % tokens) * (size // 8), tokens, "5c" * 32, "ba" * 32)


class NoRoom(Exception):
    """This machine cannot make a disk that is full; the text says why."""


@contextlib.contextmanager
def small_disk(megabytes: int) -> Iterator[Path]:
    """A disk in RAM with so much room."""
    folder = Path(tempfile.mkdtemp(prefix="llamamem-small-"))
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=0777", "none", str(folder)]
    made = subprocess.run(mount, capture_output=True, text=True) if os.geteuid() == 0 else None
    if made is None or made.returncode:
        folder.rmdir()
        raise NoRoom("a small disk needs root and the right to mount one")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
        folder.rmdir()


class Wire:
    """A port in front of another, which can be cut: after so many more bytes all of its connections end.

    `url` is the store's through it. With `draw`, each connection is cut after a number of bytes up to `most`.
    """

    def __init__(self, server: Server, *, draw: random.Random | None = None, most: int = 40_000) -> None:
        self.port = free_port()
        self.url = server.url.replace(f":{server.port}/", f":{self.port}/")
        self.draw = draw
        self.cuts = 0
        self._target = server.port
        self._most = most
        self._listener = socket.create_server(("127.0.0.1", self.port), backlog=64)
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._carry, args=(near,), daemon=True).start()

    def _carry(self, near: socket.socket) -> None:
        left = float("inf") if self.draw is None else self.draw.randint(1, self._most)
        with near, contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._target)) as far:
            while True:
                for end in select.select([near, far], [], [])[0]:
                    data = end.recv(65536)
                    if not data:
                        return
                    (far if end is near else near).sendall(data[: int(min(len(data), left))])
                    left -= len(data)
                    if left <= 0:  # perhaps in the middle of an answer
                        self.cuts += 1
                        return
