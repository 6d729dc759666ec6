"""A stand-in for a llama-server with a memory: the slot actions and completions of the real one, on a toy memory.

A token of text changes one number of the memory, and an answer tells that number: two answers are equal only if the
memory that the text began on and the text were. A slot has a memory of its own, which a slot action gave it, and a text
of whoever was answered in it last.
"""

from __future__ import annotations

import base64
import hashlib
import json
import struct
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np

from llamamem.errors import LlamamemError
from llamamem.formats.state import Identity, State, decode_state, encode_state, origin_sha256
from llamamem.sessions import Memory, Sessions

IDENTITY = Identity("5c" * 32, "ba" * 32)


def make_state(tokens: int, value: int, identity: Identity = IDENTITY) -> State:
    S = np.zeros((1, 1, 1, 2, 2, 2), np.float32)
    S[..., 0, 0, 0] = value % (1 << 24)
    return State(S, np.zeros((1, 1, 2), np.float32), np.array([[tokens]]), 4, 1, *identity)


def make_memory(tokens: int = 0, value: int = 0, identity: Identity = IDENTITY) -> Memory:
    return Memory(encode_state(make_state(tokens, value, identity)), tokens, *identity)


@dataclass(frozen=True)
class Learnt:
    """A toy memory."""

    tokens: int = 0
    value: int = 0

    def read(self, words: list[str]) -> Learnt:
        tokens, value = self.tokens + len(words), self.value
        for word in words:
            value = int.from_bytes(hashlib.sha256(f"{value} {word}".encode()).digest()[:3], "little")
        return Learnt(tokens, value)

    @property
    def said(self) -> str:
        """What is answered on it."""
        return f"{self.value:06x}"


@dataclass
class Slot:
    """Its own memory: what it was given, and its text since. `elsewhere` is a text that is another request's."""

    origin: Learnt = Learnt()
    given: bool = False
    text: list[str] = field(default_factory=list)
    elsewhere: tuple[Learnt, list[str]] | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def memory(self) -> Learnt:
        return self.origin.read(self.text)

    @property
    def tokens(self) -> int:
        return self.memory.tokens

    @property
    def value(self) -> int:
        return self.memory.value

    def read(self, words: list[str]) -> None:
        self.text = [*self.text, *words]


class Refused(Exception):
    """Answered with this status and this text."""

    def __init__(self, text: str, status: int = 400) -> None:
        super().__init__(text)
        self.status = status


class Died(Exception):
    """The connection is cut without an answer."""


class _Http(ThreadingHTTPServer):
    def handle_error(self, *args: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client may go away
            super().handle_error(*args)


class FakeServer:
    """`before[action]` is called with the slot ahead of an action or "completion"; it may raise Refused or Died.

    `run` is what /props say of this run of it; `port` is one that another server had.
    """

    def __init__(
        self, slot_dir: Path | None = None, n_slots: int = 4, *, run: str | None = None, port: int = 0
    ) -> None:
        self.slot_dir = slot_dir
        self.slots = [Slot() for _ in range(n_slots)]
        self.identity: Identity | None = IDENTITY
        self.features = ["memory", "continues"]
        self.run = run
        self.before: dict[str, Callable[[Slot], Any]] = {}
        self.after: dict[str, Callable[[Slot], Any]] = {}
        self.hold: Callable[[int], Any] = lambda number: None
        self.finish_reason = "stop"
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self._http = _Http(("127.0.0.1", port), self._handler())
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

    def props(self) -> dict[str, Any]:
        props: dict[str, Any] = {"total_slots": len(self.slots)}
        if self.identity is not None:
            shape = {"layers": [3], "state_heads": 1, "states": 1, "rank": 2, "chunk": 4, "semantics": 1}
            props["rwkv_ms"] = {**self.identity._asdict(), **shape, "mode": "batched", "features": self.features}
            if self.run is not None:
                props["rwkv_ms"]["run"] = self.run
        return props

    def state(self, id_slot: int) -> dict[str, Any]:
        slot = self.slots[id_slot]
        memory = {"tokens_written": slot.tokens, "norms": [float(slot.value)], "frozen": False, "scale": 1.0}
        point = {"origin": self.origin(slot.origin), "given": slot.given, **_text(slot.text)}
        return {"id": id_slot, "rwkv_ms": {**memory, **point}}

    def act(self, action: str, id_slot: int | None, body: dict[str, Any]) -> dict[str, Any]:
        if id_slot is None or id_slot == -1:  # the server chooses: never one that was given a memory, if it can
            id_slot = next((i for i, slot in enumerate(self.slots) if not slot.given), 0)
            named = False
        elif 0 <= id_slot < len(self.slots):
            named = True
        else:
            raise Refused(f"[slot-number] no slot {id_slot}")
        slot = self.slots[id_slot]
        with slot.lock:  # a busy slot keeps the request waiting
            self.before.get(action, lambda _: None)(slot)
            if action == "completion":
                answer = self.complete(slot, body, own=named and "memory" not in (body.get("rwkv_ms") or {}))
            else:
                answers = {
                    "erase": self.reset,
                    "memory-reset": self.reset,
                    "memory-save": self.save,
                    "memory-restore": self.restore,
                }
                answer = answers[action](slot, body)
            self.after.get(action, lambda _: None)(slot)
        return {"id_slot": id_slot, **answer}

    def reset(self, slot: Slot, body: dict[str, Any]) -> dict[str, Any]:
        slot.origin, slot.given, slot.text, slot.elsewhere = Learnt(), False, [], None
        return {"n_erased": 0}

    def save(self, slot: Slot, body: dict[str, Any]) -> dict[str, Any]:
        origin = self.origin(slot.origin)
        if (known := body.get("continues")) is not None:
            if known["origin"] != origin:
                raise Refused(f"[state-continues] began on memory {origin}, not on {known['origin']}", 409)
            if known != {"origin": origin, **_text(slot.text[: known["n_text"]])}:
                raise Refused(f"[state-continues] its text does not begin with those {known['n_text']} tokens", 409)
        data = self.bytes_of(slot.memory)
        assert "filename" not in body
        rest = {"n_bytes": len(data), "tokens_written": slot.tokens, "origin": origin, **_text(slot.text)}
        return {"memory": base64.b64encode(data).decode(), **rest}

    def restore(self, slot: Slot, body: dict[str, Any]) -> dict[str, Any]:
        slot.origin, slot.given, slot.text, slot.elsewhere = self.learnt(body["memory"]), True, [], None
        return {"tokens_written": slot.tokens}

    def complete(self, slot: Slot, body: dict[str, Any], *, own: bool) -> dict[str, Any]:
        setting = body.get("rwkv_ms") or {}
        if setting and self.identity is None:
            raise Refused("rwkv_ms: this server has no memory")
        prompt = body.get("prompt") or " ".join(message["content"] for message in body.get("messages", []))
        words = prompt.split() if isinstance(prompt, str) else [str(token) for token in prompt]
        origin = slot.origin if own else self.learnt(setting.get("memory"))
        has = (slot.origin, slot.text) if own else slot.elsewhere or (Learnt(), [])
        reused = (
            len(has[1]) if body.get("cache_prompt", True) and origin == has[0] and words[: len(has[1])] == has[1] else 0
        )
        memory, n = origin.read(words), body.get("n_predict", 2)
        said = memory.said if n else ""
        text = [*words, said] if n else words  # a second token is never written
        learnt = origin if setting.get("frozen") else origin.read(text)
        if own:
            slot.text, slot.elsewhere = text, None
        else:
            slot.elsewhere = (origin, text)
        timings = {"cache_n": reused, "prompt_n": len(words) - reused, "predicted_n": n}
        answer = {"content": said, "timings": timings}
        if "rwkv_ms" in body:
            answer["rwkv_ms"] = {"origin": self.origin(origin), "tokens_written": learnt.tokens, "reused": reused}
            if setting.get("return_memory"):
                answer["rwkv_ms"]["memory"] = base64.b64encode(self.bytes_of(learnt)).decode()
        return answer

    def bytes_of(self, memory: Learnt) -> bytes:
        assert self.identity is not None
        return encode_state(make_state(memory.tokens, memory.value, self.identity))

    def origin(self, memory: Learnt) -> str | None:
        return None if self.identity is None else origin_sha256(self.bytes_of(memory))

    def learnt(self, memory: str | None) -> Learnt:
        if memory is None:
            return Learnt()
        try:
            state = decode_state(base64.b64decode(memory, validate=True), identity=self.identity)
        except LlamamemError as e:
            raise Refused(f"Unable to restore the memory: {e}") from None
        return Learnt(int(state.tokens_written[0, 0]), int(state.S[0, 0, 0, 0, 0, 0]))

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
                    action, id_slot = "completion", body.get("id_slot")
                if url.path == "/apply-template":
                    self.answer(200, {"prompt": " ".join(message["content"] for message in body["messages"])})
                    return
                server.asked.append((action, body))
                try:
                    answer = server.act(action, id_slot, body)
                    if body.get("stream"):
                        self.stream(answer)
                    else:
                        self.answer(200, answer)
                except Refused as e:
                    error = {"code": e.status, "message": str(e), "type": "invalid_request_error"}
                    self.answer(e.status, {"error": error})
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
                last = {"rwkv_ms": answer["rwkv_ms"]} if "rwkv_ms" in answer else {}
                events.append({"choices": [], "usage": {"completion_tokens": timings["predicted_n"]}, **last})
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


def _text(words: list[str]) -> dict[str, Any]:
    """The length of a text and its hash; a word's token is a number that it is hashed to."""
    ids = [int.from_bytes(hashlib.sha256(word.encode()).digest()[:3], "little") for word in words]
    return {"n_text": len(ids), "text": hashlib.sha256(struct.pack(f"<{len(ids)}i", *ids)).hexdigest()}


def refuse(text: str) -> Callable[[Slot], None]:
    def hook(_: Slot) -> None:
        raise Refused(text)

    return hook


def die(_: Slot) -> None:
    raise Died


def talk(sessions: Sessions, slot: int, text: str) -> str:
    """A request that knows nothing of sessions, in a slot that it names."""
    return str(sessions.client.completion(text, id_slot=slot)["content"])


def wait_for(condition: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)
