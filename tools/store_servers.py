"""Private servers for stores of sessions, for tests and measurements: on a free port, in a folder, with a password.

    with redis_server(flush="always") as server:
        store = open_store(server.url)
        server.kill()       # kill -9
        server.start()      # on the same data and port

A server whose program is not on the machine is `NotHere`, which names the package.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PASSWORD = "not-to-be-shown"

RAM = Path("/dev/shm")  # a disk in RAM, where there is one: it dies with the machine alone, and flushes cost nothing

_WAIT = 60.0  # seconds until a server answers


class NotHere(Exception):
    """The machine has no program of that kind; the text says what to install."""


class Server:
    """A process of a server; `url` is the store's place on it. The caller ends it."""

    def __init__(self, url: str, port: int, command: list[str], folder: Path, user: str | None = None) -> None:
        self.url = url
        self.port = port
        self.folder = folder
        self._command = command
        self._user = user
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        log = (self.folder / "log").open("ab")
        self._process = subprocess.Popen(
            self._command, cwd=self.folder, stdout=log, stderr=log, user=self._user, start_new_session=True
        )
        log.close()
        end = time.monotonic() + _WAIT
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{self._command[0]}: {(self.folder / 'log').read_text()[-2000:]}")
            time.sleep(0.05)

    def kill(self) -> None:
        """kill -9 of all its processes."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, 9)
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        try:
            if self.url.startswith("postgresql"):
                import psycopg

                psycopg.connect(self.url, connect_timeout=5).close()
            else:
                import valkey

                with contextlib.closing(valkey.Valkey.from_url(self.url.replace("redis", "valkey", 1))) as client:
                    client.ping()
        except Exception:
            return False
        return True


@contextlib.contextmanager
def redis_server(*options: str, flush: str = "always", within: Path | None = None) -> Iterator[Server]:
    """`valkey-server` or `redis-server`. With `flush` "always" nothing acknowledged is lost, "everysec" a second."""
    program = shutil.which("valkey-server") or shutil.which("redis-server")
    if program is None:
        raise NotHere("needs valkey-server or redis-server: Debian's package redis-server")
    port = free_port()
    command = [program, "--bind", "127.0.0.1", "--port", str(port), "--requirepass", PASSWORD, "--dir", "."]
    command += ["--save", "", "--appendonly", "yes", "--appendfsync", flush, "--daemonize", "no", *options]
    with _folder(within) as folder:
        server = Server(f"redis://:{PASSWORD}@127.0.0.1:{port}/0", port, command, folder)
        yield from _running(server)


@contextlib.contextmanager
def postgres_server(*options: str, within: Path | None = None) -> Iterator[Server]:
    """As the user `postgres` where root asks: it refuses to run as root."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin")) if Path("/usr/lib/postgresql").exists() else []
    path = os.pathsep.join([*map(str, reversed(programs)), os.environ.get("PATH", "")])
    program, initdb = shutil.which("postgres", path=path), shutil.which("initdb", path=path)
    if program is None or initdb is None:
        raise NotHere("needs postgres and initdb: Debian's package postgresql")
    user = None
    if os.geteuid() == 0:
        user = "postgres"
        try:
            pwd.getpwnam(user)
        except KeyError:
            raise NotHere("needs the user postgres, whom Debian's package postgresql makes") from None
    port = free_port()
    with _folder(within) as folder:
        (folder / "password").write_text(PASSWORD)
        if user is not None:
            for place in (folder, folder / "password"):
                shutil.chown(place, user)
        data = folder / "data"
        options_of_initdb = [initdb, "-D", str(data), "-U", "llamamem", "-E", "UTF8", "--locale=C"]
        options_of_initdb += ["--no-sync", "--wal-segsize=1"]
        options_of_initdb += ["-A", "scram-sha-256", f"--pwfile={folder / 'password'}"]
        made = subprocess.run(
            options_of_initdb,
            cwd=folder,
            capture_output=True,
            text=True,
            user=user,
        )
        if made.returncode:
            raise RuntimeError(f"initdb: {made.stdout}{made.stderr}")
        command = [program, "-D", str(data), "-c", "listen_addresses=127.0.0.1", "-c", f"port={port}"]
        command += ["-c", "unix_socket_directories=", *(part for option in options for part in ("-c", option))]
        server = Server(f"postgresql://llamamem:{PASSWORD}@127.0.0.1:{port}/postgres", port, command, folder, user)
        yield from _running(server)


SERVERS: dict[str, Callable[..., contextlib.AbstractContextManager[Server]]] = {
    "valkey": redis_server,
    "postgres": postgres_server,
}


def emptied(url: str) -> None:
    """Removes all that a server of this module has."""
    if url.startswith("postgresql"):
        import psycopg

        with psycopg.connect(url) as db:
            db.execute("DROP SCHEMA public CASCADE")
            db.execute("CREATE SCHEMA public")
    else:
        import valkey

        with contextlib.closing(valkey.Valkey.from_url(url.replace("redis", "valkey", 1))) as client:
            client.flushall()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _running(server: Server) -> Iterator[Server]:
    try:
        server.start()
        yield server
    finally:
        server.kill()


@contextlib.contextmanager
def _folder(within: Path | None) -> Iterator[Path]:
    """Not in one of the tests: nobody but their user may enter those."""
    place = within if within is not None and os.access(within, os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="llamamem-store-", dir=place))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
