"""`llamamem health --probe`: two requests that touch no slot."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest


class Server(ThreadingHTTPServer):
    answers: dict[str, tuple[int, Any]]
    asked: list[str]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        status, answer = self.server.answers.get(self.path, (404, {}))
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server(("127.0.0.1", 0), Handler)
    made.asked = []
    made.answers = {"/health": (200, {"status": "ok"}), "/props": (200, {"rwkv_ms": {"mode": "batched"}})}
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


def test_ready(llamamem, server: Server) -> None:
    done = llamamem("health", "--probe", "--url", f"{server.url}/v1")
    assert (done.status, done.out, done.err) == (0, f"{server.url}: ready, memory batched\n", "")
    assert server.asked == ["/health", "/props"]
    said = json.loads(llamamem("health", "--probe", "--url", server.url, "--json").out)
    assert said == {"ok": True, "url": server.url, "detail": "ready, memory batched"}


@pytest.mark.parametrize(
    ("path", "answer", "status", "said"),
    [
        ("/health", (503, {"error": {"message": "Loading model"}}), 1, "is loading its model"),
        ("/health", (500, {}), 1, "answers 500"),
        ("/props", (401, {}), 0, "give --api-key"),
        ("/props", (200, []), 1, "without an object"),
        ("/props", (200, {"total_slots": 1}), 0, "no memory"),
    ],
)
def test_what_it_says_of_others(llamamem, server: Server, path: str, answer: Any, status: int, said: str) -> None:
    server.answers[path] = answer
    done = llamamem("health", "--probe", "--url", server.url)
    assert done.status == status and said in done.out and not done.err


def test_nobody_answers(llamamem, server: Server) -> None:
    server.shutdown()
    server.server_close()
    done = llamamem("health", "--probe", "--url", server.url, "--timeout", "1")
    assert done.status == 1 and "is the server running?" in done.out


def test_it_computes_nothing(llamamem, server: Server) -> None:
    done = llamamem("health", "--probe", "--url", server.url, "--watch", "1")
    assert done.status == 2 and "--watch" in done.err and server.asked == []
