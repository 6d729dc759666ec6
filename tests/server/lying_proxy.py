"""Stands between a client and a real llama-server, and changes one answer."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx

Change = Callable[[str, int, Any, httpx.Client], tuple[int, Any]]


class LyingProxy:
    """`change(path and query, status, answer, http)` gives the status and the answer instead; `http` is the server."""

    def __init__(self, url: str, change: Change) -> None:
        self._server = httpx.Client(base_url=url, timeout=60, trust_env=False)
        self._change = change
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> LyingProxy:
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._server.close()

    def _handler(proxy) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # an answer goes out at once, head and body

            def do_GET(self) -> None:
                self.pass_on(b"")

            def do_POST(self) -> None:
                self.pass_on(self.rfile.read(int(self.headers["Content-Length"])))

            def pass_on(self, body: bytes) -> None:
                headers = {"Content-Type": "application/json"}
                answer = proxy._server.request(self.command, self.path, content=body, headers=headers)
                status, value = proxy._change(self.path, answer.status_code, answer.json(), proxy._server)
                data = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
                self.wfile.flush()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        return Handler
