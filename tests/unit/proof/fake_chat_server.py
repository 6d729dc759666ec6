"""A stand-in for llama-server's chat: one token a character, answers that the test writes.

It can refuse, cut the connection, and keep an answer back until it is let go.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = Callable[[dict[str, Any]], str]

MEMORY = {"base_sha256": "ba" * 32, "sidecar_sha256": "5c" * 32, "mode": "serial"}


class Refused(Exception):
    """Answered with this HTTP status and text."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Died(Exception):
    """The connection is cut without an answer."""


class FakeChatServer:
    """`reply(body)` is the answer to a chat completion; it may raise."""

    def __init__(self, reply: Reply = lambda body: "yes", *, slots: int = 1) -> None:
        self.reply = reply
        self.memory: dict[str, Any] | None = dict(MEMORY)
        self.slots = slots
        self.asked: list[dict[str, Any]] = []
        self.erased: list[int] = []
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> FakeChatServer:
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    @property
    def questions(self) -> list[str]:
        return [body["messages"][-1]["content"] for body in self.asked]

    def template(self, messages: list[dict[str, str]]) -> str:
        return "".join(f"[{message['role']}]{message['content']}" for message in messages)

    def get(self, path: str) -> Any:
        if path == "/props":
            props: dict[str, Any] = {"model_path": "base.gguf", "total_slots": self.slots}
            return props if self.memory is None else {**props, "rwkv_ms": self.memory}
        return [{"id": i} for i in range(self.slots)]

    def post(self, path: str, body: dict[str, Any]) -> Any:
        if path.startswith("/slots/"):
            self.erased.append(int(path[len("/slots/")]))
            return {}
        if path == "/apply-template":
            return {"prompt": self.template(body["messages"])}
        if path == "/tokenize":
            return {"tokens": [ord(c) for c in body["content"]]}
        if path == "/detokenize":
            return {"content": "".join(map(chr, body["tokens"]))}
        return self.chat(body)

    def chat(self, body: dict[str, Any]) -> dict[str, Any]:
        self.asked.append(body)
        text = self.reply(body)[: body["max_tokens"]]
        n_prompt = len(self.template(body["messages"]))
        memory = {"origin": None, "tokens_written": n_prompt + len(text) - 1, "reused": 0}
        return {
            **({"rwkv_ms": memory} if "rwkv_ms" in body else {}),
            "choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": n_prompt, "completion_tokens": len(text)},
            "timings": {"prompt_ms": 1.0},
            "__verbose": {"tokens": [ord(c) for c in text]},
        }

    def _handler(server) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1

            def do_GET(self) -> None:
                self.answer(200, server.get(self.path))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                try:
                    self.answer(200, server.post(self.path, body))
                except Refused as e:
                    self.answer(e.status, {"error": {"code": e.status, "message": str(e)}})
                except Died:
                    self.close_connection = True

            def answer(self, status: int, value: Any) -> None:
                data = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
                self.wfile.flush()

            def log_message(self, *args: object) -> None:
                pass

        return Handler
