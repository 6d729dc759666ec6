"""A stand-in for a llama-server with a memory: the slot actions and completions of the real one, on a toy memory.

A token of text changes one number of the memory, and an answer tells that number and the text that the slot has: two
answers are equal only if memory and text were.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np

from llamamem.errors import LlamamemError
from llamamem.formats.state import MEMORY, Identity, State, encode_state, read_state
from llamamem.sessions import Memory, Sessions

IDENTITY = Identity("5c" * 32, "ba" * 32)


def make_state(tokens: int, value: int, identity: Identity = IDENTITY) -> State:
    S = np.zeros((1, 1, 1, 2, 2, 2), np.float32)
    S[..., 0, 0, 0] = value % (1 << 24)
    return State(S, np.zeros((1, 1, 2), np.float32), np.array([[tokens]]), 4, 1, *identity)


def make_memory(tokens: int = 0, value: int = 0, identity: Identity = IDENTITY) -> Memory:
    return Memory(encode_state(make_state(tokens, value, identity)), tokens, *identity)


@dataclass
class Slot:
    text: list[str] = field(default_factory=list)
    tokens: int = 0
    value: int = 0
    origin: tuple[int, int] = (0, 0)  # tokens and value that a new text starts on
    lock: threading.Lock = field(default_factory=threading.Lock)

    def read(self, words: list[str]) -> None:
        self.text += words
        self.tokens += len(words)
        for word in words:
            self.value = int.from_bytes(hashlib.sha256(f"{self.value} {word}".encode()).digest()[:3], "little")


class Refused(Exception):
    """Answered with HTTP 400 and this text."""


class Died(Exception):
    """The connection is cut without an answer."""


class _Http(ThreadingHTTPServer):
    def handle_error(self, *args: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client may go away
            super().handle_error(*args)


class FakeServer:
    """`before[action]` is called with the slot ahead of an action or "completion"; it may raise Refused or Died."""

    def __init__(self, slot_dir: Path, n_slots: int = 4) -> None:
        self.slot_dir = slot_dir
        self.slots = [Slot() for _ in range(n_slots)]
        self.identity: Identity | None = IDENTITY
        self.before: dict[str, Callable[[Slot], Any]] = {}
        self.after: dict[str, Callable[[Slot], Any]] = {}
        self.hold: Callable[[int], Any] = lambda number: None
        self.finish_reason = "stop"
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self._http = _Http(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> FakeServer:
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    @property
    def actions(self) -> list[str]:
        return [action for action, _ in self.asked]

    @property
    def left(self) -> list[str]:
        """The files in the slot directory, but for what sessions note beside the slots."""
        return [path.name for path in self.slot_dir.iterdir() if not path.name.startswith(".llamamem-")]

    def props(self) -> dict[str, Any]:
        props: dict[str, Any] = {"total_slots": len(self.slots)}
        if self.identity is not None:
            props["rwkv_ms"] = {**self.identity._asdict(), "mode": "batched", "layers": [3]}
        return props

    def state(self, id_slot: int) -> dict[str, Any]:
        slot = self.slots[id_slot]
        memory = {"tokens_written": slot.tokens, "norms": [float(slot.value)], "frozen": False, "scale": 1.0}
        return {"id": id_slot, "rwkv_ms": memory}

    def act(self, action: str, id_slot: int, body: dict[str, Any]) -> dict[str, Any]:
        slot = self.slots[id_slot % len(self.slots)]  # as the real one does
        with slot.lock:  # a busy slot keeps the request waiting
            self.before.get(action, lambda _: None)(slot)
            answer = {
                "completion": self.complete,
                "erase": self.erase,
                "memory-save": self.save,
                "memory-restore": self.restore,
            }[action](slot, body)
            self.after.get(action, lambda _: None)(slot)
        return {"id_slot": id_slot, **answer}

    def erase(self, slot: Slot, body: dict[str, Any]) -> dict[str, Any]:
        slot.text, slot.tokens, slot.value, slot.origin = [], 0, 0, (0, 0)
        return {"n_erased": 0}

    def save(self, slot: Slot, body: dict[str, Any]) -> dict[str, Any]:
        assert self.identity is not None
        data = encode_state(make_state(slot.tokens, slot.value, self.identity))
        (self.slot_dir / body["filename"]).write_bytes(data)
        return {"filename": body["filename"], "n_bytes": len(data), "tokens_written": slot.tokens}

    def restore(self, slot: Slot, body: dict[str, Any]) -> dict[str, Any]:
        try:
            state = read_state(self.slot_dir / body["filename"], identity=self.identity, kinds=(MEMORY,))
        except LlamamemError as e:
            raise Refused(f"Unable to restore the memory: {e}") from None
        slot.text, slot.tokens, slot.value = [], int(state.tokens_written[0, 0]), int(state.S[0, 0, 0, 0, 0, 0])
        slot.origin = slot.tokens, slot.value
        return {"filename": body["filename"], "n_bytes": state.size, "tokens_written": slot.tokens}

    def complete(self, slot: Slot, body: dict[str, Any]) -> dict[str, Any]:
        prompt = body.get("prompt") or " ".join(message["content"] for message in body.get("messages", []))
        words = prompt.split() if isinstance(prompt, str) else [str(token) for token in prompt]
        reused = len(slot.text) if body["cache_prompt"] and words[: len(slot.text)] == slot.text else 0
        if slot.text and not body["cache_prompt"]:
            self.erase(slot, {})
        elif not reused:
            slot.text, (slot.tokens, slot.value) = [], slot.origin
        words = words[reused:]
        frozen = body.get("rwkv_ms", {}).get("frozen", False)
        kept = replace(slot)
        slot.read(words)
        said = f"{slot.value:06x}"
        slot.read([said])
        if frozen:
            slot.tokens, slot.value = kept.tokens, kept.value
        timings = {"cache_n": reused, "prompt_n": len(words), "predicted_n": 2}  # the second one is never written
        return {"content": said, "timings": timings}

    def _handler(server) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # an answer goes out at once, head and body

            def do_GET(self) -> None:
                slots = [server.state(i) for i in range(len(server.slots))]
                self.answer(200, slots if self.path == "/slots" else server.props())

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                url = urlsplit(self.path)
                if url.path.startswith("/slots/"):
                    action, id_slot = parse_qs(url.query)["action"][0], int(url.path.removeprefix("/slots/"))
                else:
                    action, id_slot = "completion", body["id_slot"]
                server.asked.append((action, body))
                try:
                    answer = server.act(action, id_slot, body)
                    if body.get("stream"):
                        self.stream(answer)
                    else:
                        self.answer(200, answer)
                except Refused as e:
                    self.answer(400, {"error": {"code": 400, "message": str(e), "type": "invalid_request_error"}})
                except Died:
                    self.close_connection = True

            def answer(self, status: int, value: Any) -> None:
                data = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
                self.wfile.flush()

            def stream(self, answer: dict[str, Any]) -> None:
                """The text in pieces of two characters. `server.hold` is called between them."""
                said, timings = answer["content"], answer["timings"]
                deltas = [{"role": "assistant"}, *({"content": said[i : i + 2]} for i in range(0, len(said), 2))]
                events: list[dict[str, Any]] = [{"choices": [{"finish_reason": None, "delta": d}]} for d in deltas]
                events.append({"choices": [{"finish_reason": server.finish_reason, "delta": {}}]})
                events.append({"choices": [], "usage": {"completion_tokens": timings["predicted_n"]}})
                self.close_connection = True
                self.send_response(200)
                self.send_header("Connection", "close")
                self.end_headers()
                for number, event in enumerate(events):
                    server.hold(number)
                    self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
                    self.wfile.flush()
                self.wfile.write(b"data: [DONE]\n\n")

            def log_message(self, *args: object) -> None:
                pass

        return Handler


def refuse(text: str) -> Callable[[Slot], None]:
    def hook(_: Slot) -> None:
        raise Refused(text)

    return hook


def die(_: Slot) -> None:
    raise Died


def talk(sessions: Sessions, slot: int, text: str) -> str:
    """A request that knows nothing of sessions."""
    return str(sessions.client.completion(text, id_slot=slot, cache_prompt=False)["content"])


def wait_for(condition: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)
