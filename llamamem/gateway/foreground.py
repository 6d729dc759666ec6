"""A server and the gateway in front of it, until a signal comes: what `llamamem serve --sessions` does.

The gateway is on the public port once the server is ready, and stays there while a server that ended by itself is
started again: until then its clients are told 503. Exit statuses are those of `llamamem.serving.foreground`.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable
from contextlib import ExitStack
from socket import socket

from llamamem.formats.run import RunRecord
from llamamem.gateway.app import Gateway, Settings
from llamamem.gateway.run import Running
from llamamem.gateway.upstream import Upstream
from llamamem.serving.foreground import (
    ENDED,
    KILLED,
    STOPPED,
    Disk,
    Follower,
    Signals,
    StopRequested,
    reap_strangers,
    say_line,
)
from llamamem.serving.preflight import Checked
from llamamem.serving.process import Server, launch, url_of
from llamamem.serving.profiles import Plan
from llamamem.sessions.store import SessionStore

_QUICK = 10.0  # seconds; a server that ends sooner than that after it was ready has something
_MOST = 5  # times in a row that it may


def serve_sessions(
    plan: Plan,
    checked: Checked,
    signals: Signals,
    store: SessionStore,
    settings: Settings,
    listener: socket,
    *,
    build: str,
    name: str | None = None,
    stall_timeout: float = 300.0,
    grace: float = 10.0,
    on_ready: Callable[[RunRecord], None] = lambda record: None,
) -> int:
    """Raises LlamamemError when the server does not become ready the first time. Nothing outlives the call."""
    key = secrets.token_urlsafe(24)  # nobody but the gateway talks to the server
    host, port = listener.getsockname()[:2]
    url = url_of(host, port)
    gateway = Gateway(store, Upstream("", key), settings)
    quick = 0
    with ExitStack() as stack:
        running: Running | None = None
        while True:
            server = launch(
                plan,
                checked,
                build=build,
                name=name,
                stops_on_signal=True,
                gateway=url,
                hidden={"LLAMA_API_KEY": key},
            )
            watch = _Watch(server, signals)
            try:
                server.wait_ready(stall_timeout=stall_timeout, api_key=key, on_wait=watch)
                gateway.upstream.moved(server.url)
                if running is None:
                    running = stack.enter_context(Running(gateway, listener, grace=grace))
                    on_ready(server.record)
                began = time.monotonic()
                server.wait(watch)
            except StopRequested:
                if running is not None:
                    running.drain(signals.twice)
                ending = server.stop(grace, hurry=signals.twice)
                say_line(
                    "llamamem: "
                    + {
                        "killed": "the server did not stop on request, and was killed",
                        "exited": f"the server ended by itself: it {server.how_it_ended}; log: {server.log_path}",
                        "stopped": "the gateway and its server were stopped on request",
                    }[ending]
                )
                return {"killed": KILLED, "exited": ENDED, "stopped": STOPPED}[ending]
            finally:
                server.stop(grace, hurry=signals.twice)
                watch.follow.close()
            quick = quick + 1 if time.monotonic() - began < _QUICK else 1
            say_line(f"llamamem: the server ended by itself: it {server.how_it_ended}; log: {server.log_path}")
            if quick >= _MOST:
                say_line(f"llamamem: it did so {quick} times in a row, and is not started again")
                return ENDED
            name = name or server.record.name
            if quick > 1 and not watch.pause(2.0**quick / 10):
                return STOPPED


class _Watch:
    """What is done between two looks at a server."""

    def __init__(self, server: Server, signals: Signals) -> None:
        self.follow = Follower(server.log_path)
        self._disk = Disk(server, say_line)
        self._server = server
        self._signals = signals

    def __call__(self) -> None:
        self.follow()
        self._disk.look()
        if os.getpid() == 1:
            reap_strangers(self._server.process.pid)
        self._signals.check()

    def pause(self, seconds: float) -> bool:
        """False when a signal came meanwhile."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self._signals.received:
                return False
            time.sleep(0.05)
        return True
