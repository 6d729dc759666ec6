"""docs/stores.md: each backup is made, the store is lost, and it is restored."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from store_places import memory
from store_servers import PASSWORD, RAM, Server, emptied, postgres_server, redis_server

from llamamem.sessions import SessionStore, open_store
from llamamem.sessions.session import Conversation

NAMES = [f"user {i}" for i in range(30)] + ["a/b'; --", "\U0001f9e0"]


def filled(place: str) -> SessionStore:
    store = open_store(place)
    for i, name in enumerate(NAMES):
        saved = store.save(store.create(name), memory(i))
        store.save(saved, memory(i + 100), conversation=Conversation(id="c"), origin=memory(i).data)
    store.within("key").create("another's")
    return store


def whole(place: str) -> None:
    store = open_store(place)
    assert [(e.label, e.fault) for e in store.entries(verify=True)] == [(name, None) for name in sorted(NAMES)]
    for i, name in enumerate(NAMES):
        record = store.read(name)
        assert (record.state, record.origin) == (memory(i + 100).data, memory(i).data)
        assert store.undo(name).tokens == i
    assert [e.label for e in store.within("key").entries()] == ["another's"]
    assert store.total_bytes() == sum(len(memory(i).data) for i in range(len(NAMES)))
    store.close()


def run(*command: str | Path, **environ: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environ})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_directory(tmp_path: Path) -> None:
    place, backup = tmp_path / "store", tmp_path / "backup.tar"
    filled(str(place))
    run("tar", "-C", place, "-cf", backup, "--exclude=./locks", ".")
    shutil.rmtree(place)
    place.mkdir()
    run("tar", "-C", place, "-xpf", backup)
    whole(str(place))


def test_sqlite(tmp_path: Path) -> None:
    place = tmp_path / "store.db"
    filled(f"sqlite:{place}")
    sqlite3.connect(place).backup(sqlite3.connect(tmp_path / "backup.db"))
    place.unlink()
    shutil.copy(tmp_path / "backup.db", place)
    whole(f"sqlite:{place}")


def test_valkey(tmp_path: Path, servers: Callable[[str], Server]) -> None:
    server = servers("valkey")
    emptied(server.url)
    filled(server.url).close()
    cli = shutil.which("valkey-cli") or shutil.which("redis-cli")
    if cli is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("needs redis-cli: Debian's package redis-tools")
    run(cli, "-p", str(server.port), "--rdb", tmp_path / "backup.rdb", REDISCLI_AUTH=PASSWORD)
    emptied(server.url)
    assert open_store(server.url).entries() == []
    with redis_server("--dir", str(tmp_path), "--dbfilename", "backup.rdb", "--appendonly", "no", within=RAM) as other:
        run(cli, "-p", str(other.port), "config", "set", "appendonly", "yes", REDISCLI_AUTH=PASSWORD)
        whole(other.url)


def test_postgres(tmp_path: Path, servers: Callable[[str], Server]) -> None:
    server = servers("postgres")
    emptied(server.url)
    filled(server.url).close()
    (tmp_path / "backup.sql").write_text(run("pg_dump", "--table", "llamamem_*", server.url))
    emptied(server.url)
    with postgres_server(within=RAM) as other:
        run("psql", "-v", "ON_ERROR_STOP=1", "-qf", tmp_path / "backup.sql", other.url)
        whole(other.url)
