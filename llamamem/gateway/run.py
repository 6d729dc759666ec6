"""The gateway on a port, in a thread of its own beside the loop that watches over llama-server."""

from __future__ import annotations

import logging
import socket
import sys
import threading
from collections.abc import Callable

import uvicorn

from llamamem.errors import LlamamemError
from llamamem.gateway.app import Gateway
from llamamem.gateway.connection import Connection

_START = 30.0  # seconds
# Seconds after which a thread that computes lets another have the interpreter. A call of the store waits for its turn
# at each look at the disk, and Python's own 5 ms each time are more than the call itself.
_SWITCH = 0.0005
_CONNECTIONS = 2000  # at a time; more are told 503


def listen(host: str, port: int) -> socket.socket:
    """The public port, taken before anything else is started. Raises LlamamemError."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, proto)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.set_inheritable(False)
        return listener
    except OSError as e:
        raise LlamamemError(
            f"--host {host} --port {port}: cannot listen there ({e.strerror or e}); give another port (0: a free one)"
        ) from None


class Running:
    """`with Running(gateway, listener):` it answers until the block ends, which waits for what is being answered.

    `grace` is in seconds: turns that take longer are cancelled, and their sessions are as before.
    """

    def __init__(self, gateway: Gateway, listener: socket.socket, *, grace: float = 10.0) -> None:
        self._gateway = gateway
        self._listener = listener
        self._config = uvicorn.Config(
            gateway,
            http=Connection,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=max(1, round(grace)),
            limit_concurrency=_CONNECTIONS,
        )
        self._server = uvicorn.Server(self._config)
        self._thread = threading.Thread(target=self._serve, name="gateway", daemon=True)

    def __enter__(self) -> Running:
        for name in ("uvicorn.error", "uvicorn.access", "uvicorn.asgi"):  # whose lines have paths in them
            logging.getLogger(name).disabled = True
        self._thread.start()
        for _ in range(int(_START / 0.01)):
            if self._server.started:
                return self
            if not self._thread.is_alive():
                break
            self._thread.join(0.01)
        raise LlamamemError("the gateway did not start; see what it logged above")

    def __exit__(self, *_: object) -> None:
        self.drain()

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    def drain(self, hurry: Callable[[], bool] = lambda: False) -> None:
        """Takes no more requests, and ends with those that are being answered; `hurry` says when not to wait."""
        self._gateway.draining = True
        self._server.should_exit = True
        while self._thread.is_alive():
            self._server.force_exit = hurry()
            self._thread.join(0.05)

    def _serve(self) -> None:
        sys.setswitchinterval(min(_SWITCH, sys.getswitchinterval()))
        self._server.run(sockets=[self._listener])
