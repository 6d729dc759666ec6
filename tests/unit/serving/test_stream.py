"""Streamed answers, whole and broken, byte for byte as a server may send them."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from llamamem.errors import LlamamemError
from llamamem.serving.client import Client, Delta

Answers = Callable[..., Client]
MESSAGES = [{"role": "user", "content": "hello"}]


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields, ensure_ascii=False).encode() + b"\n\n"


def piece(**delta: str) -> bytes:
    return event(choices=[{"finish_reason": None, "delta": delta}])


DONE = b"data: [DONE]\n\n"


@pytest.fixture
def asked() -> list[dict[str, Any]]:
    return []


@pytest.fixture
def answers(asked: list[dict[str, Any]]) -> Iterator[Answers]:
    """`answers(200, b"...", b"...")`: a client of a server that sends these pieces and cuts the connection."""
    servers: list[ThreadingHTTPServer] = []

    def serve(status: int, *pieces: bytes) -> Client:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(status)
                self.end_headers()
                for sent in pieces:
                    self.wfile.write(sent)
                    self.wfile.flush()

            def log_message(self, *args: object) -> None:
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, args=(0.02,), daemon=True).start()
        return Client(f"http://127.0.0.1:{servers[-1].server_port}", timeout=10)

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def said(client: Client, **kwargs: Any) -> list[Delta]:
    with client:
        return list(client.stream_chat(MESSAGES, **kwargs))


def test_pieces_come_as_they_were_sent(answers: Answers) -> None:
    end = event(choices=[{"finish_reason": "stop", "delta": {}}])
    total = event(choices=[], usage={"completion_tokens": 2}, timings={"prompt_n": 7})
    thought, text, ping = piece(reasoning_content="hm"), piece(content="a"), b":\n\n"
    assert said(answers(200, piece(role="assistant"), ping, thought, text, end, total, DONE)) == [
        Delta(),
        Delta(reasoning="hm"),
        Delta("a"),
        Delta(finish_reason="stop"),
        Delta(usage={"completion_tokens": 2}, timings={"prompt_n": 7}),
    ]


@pytest.mark.parametrize("text", ["two\nlines", "a\u2028b\u0085c\x0cd\r", "Ж日本\U0001f41d", 'data: {"'])
def test_no_character_of_a_text_ends_a_piece(answers: Answers, text: str) -> None:
    raw = piece(content=text) + DONE
    for pieces in ([raw], [raw[i : i + 1] for i in range(len(raw))]):
        assert said(answers(200, *pieces)) == [Delta(text)]


def test_fields_are_greedy_unless_given_and_none_leaves_them_to_the_server(
    answers: Answers, asked: list[dict[str, Any]]
) -> None:
    said(answers(200, DONE))
    said(answers(200, DONE), temperature=None, top_k=None, seed=None, max_tokens=3, id_slot=1)
    greedy, own = asked
    assert greedy["temperature"] == 0 and greedy["stream"] is True
    assert set(own) == {"messages", "stream", "stream_options", "max_tokens", "id_slot"}


@pytest.mark.parametrize(
    ("status", "pieces", "message"),
    [
        (400, [b'{"error": {"code": 400, "message": "exceeds the context"}}'], "answered 400: exceeds the context"),
        (503, [b"<html>busy</html>"], "answered 503: <html>busy"),
        (200, [piece(content="a"), event(error={"code": 500, "message": "out of slots"})], "broke off: out of slots"),
        (200, [piece(content="a"), event(error="what")], "broke off: what"),
        (200, [piece(content="a")], "broke off; see the server's log"),
        (200, [piece(content="a"), b'data: {"choices": [{"del'], "broke off; see"),
        (200, [b"data: not json\n\n", DONE], "broke off; see"),
        (200, [], "broke off; see"),
    ],
)
def test_an_answer_that_is_not_whole_is_an_error(
    answers: Answers, status: int, pieces: list[bytes], message: str
) -> None:
    with pytest.raises(LlamamemError, match=message):
        said(answers(status, *pieces))


def test_nobody_there(answers: Answers) -> None:
    with pytest.raises(LlamamemError, match="is the server running"):
        said(Client("http://127.0.0.1:9"))
