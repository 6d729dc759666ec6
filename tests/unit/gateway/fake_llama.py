"""`tests/fake_server.py`, a llama-server whose memory is a chain of hashes, on a port: what a gateway needs of one."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from entitled.wire import Reply
from fake_server import FakeServer, word_ids

ROUTES = ("/completion", "/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages")


class FakeModel(FakeServer):
    """With the routes of the real one that a gateway asks beside those that generate."""

    def handle(self, method: str, path: str, body: Any) -> Reply:
        if path == "/apply-template":
            turns = (
                f"<|turn>{'model' if m['role'] == 'assistant' else 'user'}\n{m['content']}<turn|>\n"
                for m in body["messages"]
            )
            end = "<|turn>model\n" if body.get("add_generation_prompt", True) else ""
            return Reply(200, {"prompt": "<bos>" + "".join(turns) + end})
        if path == "/props":
            memory = {"sidecar_sha256": "0" * 64, "base_sha256": "1" * 64, "features": ["memory", "continues"]}
            memory |= {"layers": [0], "state_heads": 1, "states": 1, "rank": 4, "chunk": 1024, "semantics": 1}
            return Reply(
                200, {"rwkv_ms": memory, "total_slots": self.n_slots, "default_generation_settings": {"n_ctx": 64}}
            )
        if path == "/tokenize":
            return Reply(200, {"tokens": [2 for _ in [0] if body.get("add_special")] + word_ids(body["content"])})
        if "action=forget" in path:
            self.cache = []
            for slot in self.slots:
                slot.live = type(slot.live)()
            return Reply(200, {})
        if path == "/v1/messages" and body and isinstance(body.get("system"), str):
            body = {**body, "messages": [{"role": "system", "content": body["system"]}, *body["messages"]]}
        return super().handle(method, path, body)


class FakeLlama:
    """Asked over HTTP. `before` is called with each request ahead of its answer and may raise Died; `piece` between
    two events of a stream."""

    def __init__(self, n_slots: int = 4) -> None:
        self.model = FakeModel(n_slots)
        self.lock = threading.Lock()
        self.asked: list[tuple[str, str, dict[str, str], Any]] = []
        self.before: Callable[[str, Any], Any] = lambda path, body: None
        self.piece: Callable[[int], Any] = lambda number: None
        self._http = _Http(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> FakeLlama:
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def turns(self) -> list[Any]:
        """The bodies of what was generated."""
        return [body for _, path, _, body in self.asked if path in ROUTES]

    def _handler(llama) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.take()

            def do_HEAD(self) -> None:
                self.take()

            def do_POST(self) -> None:
                self.take()

            def do_DELETE(self) -> None:
                self.take()

            def take(self) -> None:
                data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                body = json.loads(data) if data[:1] in (b"{", b"[") else None
                llama.asked.append((self.command, self.path, {k.lower(): v for k, v in self.headers.items()}, body))
                self.close_connection = True
                try:
                    llama.before(self.path, body)
                except Died:
                    return
                if self.path == "/health":
                    return self.send(200, {"status": "ok"})
                if self.path not in ROUTES and not self.path.startswith(("/slots", "/props", "/tokenize", "/apply")):
                    return self.send(200, {"path": self.path, "headers": dict(self.headers)})
                with llama.lock:
                    reply = llama.model.handle(self.command, self.path, body)
                if reply.events is None:
                    return self.send(reply.status, ended(self.path, reply.body, body))
                with contextlib.suppress(OSError, Died):
                    self.stream(reply.events, body)

            def send(self, status: int, value: Any) -> None:
                data = dumped(value).encode()
                with contextlib.suppress(OSError):
                    self.send_response(status)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Access-Control-Allow-Origin", "*")
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(b"" if self.command == "HEAD" else data)

            def stream(self, events: list[Any], body: Any) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.send_header("Connection", "close")
                self.end_headers()
                *pieces, last = events
                if self.path == "/v1/responses":
                    text = "".join(event["delta"] for event in pieces)
                    part = {"type": "output_text", "text": text}
                    last["response"]["output"] = [{"type": "message", "role": "assistant", "content": [part]}]
                for number, event in enumerate([*pieces, *ends(self.path, last, body, len(pieces))]):
                    llama.piece(number)
                    name = f"event: {event['type']}\n" if "type" in event else ""
                    self.wfile.write(f"{name}data: {dumped(event)}\n\n".encode())
                    self.wfile.flush()
                if self.path in ("/v1/completions", "/v1/chat/completions"):
                    self.wfile.write(b"data: [DONE]\n\n")

            def log_message(self, *args: object) -> None:
                pass

        return Handler


def dumped(value: Any) -> str:
    """As llama-server writes it."""
    return json.dumps(value, separators=(",", ":"))


class Died(Exception):
    """The connection is cut."""


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *args: Any) -> None:
        pass


def ended(route: str, answer: Any, asked: Any) -> Any:
    """An answer in one piece, with why it ended."""
    if not isinstance(answer, dict) or "error" in answer or route not in ROUTES:
        return answer
    cut = _was_cut(route, answer, asked)
    if route == "/completion":
        return {**answer, "stop": True, "stop_type": "limit" if cut else "eos"}
    if route in ("/v1/completions", "/v1/chat/completions"):
        answer["choices"][0]["finish_reason"] = "length" if cut else "stop"
    if route == "/v1/messages":
        answer["stop_reason"] = "max_tokens" if cut else "end_turn"
    if route == "/v1/responses":
        answer["output"][0] |= {"type": "message", "role": "assistant"}
    return answer


def ends(route: str, last: dict[str, Any], asked: Any, n: int) -> list[dict[str, Any]]:
    """The last events of a stream, as the real one has them."""
    cut = n >= _limit(asked)
    if route == "/completion":
        return [{**last, "stop": True, "stop_type": "limit" if cut else "eos"}]
    if route in ("/v1/completions", "/v1/chat/completions"):
        choice = {"index": 0, "finish_reason": "length" if cut else "stop"}
        choice |= {"text": ""} if route == "/v1/completions" else {"delta": {}}
        return [{**last, "choices": [choice]}]
    if route == "/v1/messages":
        stop = {"type": "message_delta", "delta": {"stop_reason": "max_tokens" if cut else "end_turn"}}
        return [stop, {"type": "message_stop", **{k: v for k, v in last.items() if k == "rwkv_ms"}}]
    return [last]


def _was_cut(route: str, answer: dict[str, Any], asked: Any) -> bool:
    if route == "/completion":
        return len(answer["tokens"]) >= _limit(asked)
    parts = answer.get("content") or answer.get("output", [{}])[0].get("content")
    text = parts[0]["text"] if parts else None
    if text is None:
        choice = answer["choices"][0]
        text = choice["text"] if "text" in choice else choice["message"]["content"]
    return len(text.split()) >= _limit(asked)


def _limit(asked: dict[str, Any]) -> int:
    return int(asked.get("n_predict", asked.get("max_tokens", asked.get("max_output_tokens", 9))))


def pause(seconds: float) -> Callable[..., None]:
    return lambda *_: time.sleep(seconds)
