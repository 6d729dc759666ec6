"""A stand-in for a llama-server with a memory. It is honest, and healthy, but for the lies that it is told to tell.

Its model is a hash: what comes next depends on every token of the text and on the memory before the last of them, and
the memory on every token that was written to it. Two answers are equal only if text and memory were.
"""

from __future__ import annotations

import base64
import hashlib
import json
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np

from llamamem.errors import LlamamemError
from llamamem.formats.sidecar import Sidecar, read_sidecar
from llamamem.formats.state import SEQUENCE, Identity, State, decode_state, encode_state, identity_of, read_state
from llamamem.formats.state.block import CHECKSUM, Header
from llamamem.native import vendor

VOCABULARY = 400
BOS = 2


@dataclass
class Memory:
    tokens: int = 0
    value: int = 0  # 24 bits, 0 when nothing was written

    def write(self, token: int) -> None:
        self.tokens += 1
        self.value = _hash("memory", self.value, token) % (1 << 24) or 1


@dataclass
class Slot:
    id: int
    text: list[int] = field(default_factory=list)
    memory: Memory = field(default_factory=Memory)
    origin: Memory = field(default_factory=Memory)
    scale: float = 1.0
    frozen: bool = False
    given: bool = False
    salt: int = 0  # another KV cache than that of the text
    aside: Slot | None = field(default=None, compare=False)  # the text of requests that brought a memory along

    def clear(self, origin: Memory | None = None) -> None:
        self.origin = origin or Memory()
        self.text, self.memory, self.salt = [], replace(self.origin), 0


class Refused(Exception):
    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class LyingServer:
    """`lies` are names; where one is asked for stands what it does. `log_lines` edits the log before it is written."""

    def __init__(
        self,
        directory: Path,
        model: Path,
        sidecar: Path,
        lies: set[str] | None = None,
        *,
        profile: str = "serial",
        log_lines: Callable[[list[str]], list[str]] = lambda lines: lines,
    ) -> None:
        self.lies, self.profile, self.model = lies or set(), profile, model
        self.sidecar: Sidecar = read_sidecar(sidecar)
        self.identity = identity_of(self.sidecar)
        # what it really has loaded
        self.loaded = self.identity
        if "loaded another sidecar" in self.lies:
            self.loaded = Identity("5c" * 32, self.identity.base_sha256)
        self.slots = [Slot(i) for i in range(3 if profile == "batched" else 1)]
        self.run_id = "20260101-000000-abcdef"
        self.slot_dir, self.log = directory / "slots", directory / "server.log"
        self.slot_dir.mkdir()
        self.asked: list[str] = []
        self.working = threading.RLock()  # an action waits for the end of a request
        self.hold = threading.Event()  # set at the end: lets go of what hangs
        self._noise = 0
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self.log.write_text("".join(f"{line}\n" for line in log_lines(self.first_lines())))

    def __enter__(self) -> LyingServer:
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.hold.set()
        self._http.shutdown()
        self._http.server_close()

    def first_lines(self) -> list[str]:
        s, i = self.sidecar, self.identity
        off = self.profile == "serial"
        shape = f"layers=0-{len(s.layers) - 1} rank={s.rank} states={s.states} chunk={s.chunk} semantics={s.semantics}"
        facts = [
            f"memory active: {shape} mode={self.profile} sidecar={i.sidecar_sha256} base={i.base_sha256}",
            "one slot" if len(self.slots) == 1 else f"{len(self.slots)} slots",
            f"prompt cache {'off' if off else 'on'}: cache_prompt={int(not off)} cache_ram=0 MiB",
            f"context checkpoints {'off' if off else 'on'}: max={0 if off else 32}",
            f"warm-up {'skipped' if off else 'done'}",
            f"slot save/restore enabled: {self.slot_dir}/",
            "exact-prefix reuse: a prompt reuses a sequence only if it extends all of it",
        ]
        return [f"llamamem: run {self.run_id}", *(f"0.00.001.000 I memory: {fact}" for fact in facts)]

    # -- what it says of itself

    def props(self) -> dict[str, Any]:
        s = self.sidecar
        props: dict[str, Any] = {
            "llamamem_build": vendor.identity(),
            "build_info": "b1",
            "total_slots": len(self.slots),
            "model_alias": str(self.model),
            "model_path": str(self.model),
            "modalities": {"vision": False, "audio": False},
            "rwkv_ms": {
                **self.identity._asdict(),
                "fingerprint": self.identity.fingerprint,
                "layers": [layer.layer for layer in s.layers],
                "rank": s.rank,
                "state_heads": s.heads,
                "states": s.states,
                "chunk": s.chunk,
                "semantics": s.semantics,
                "mode": self.profile,
                "alpha": s.alpha,
            },
        }
        if "stock build" in self.lies:
            del props["llamamem_build"]
        if "other build" in self.lies:
            props["llamamem_build"] = "000000000+000000000000"
        if "base only" in self.lies:
            del props["rwkv_ms"]
        if "other mode" in self.lies:
            props["rwkv_ms"]["mode"] = "batched"
        if "more slots" in self.lies:
            props["total_slots"] += 1
        if "takes images" in self.lies:
            props["modalities"]["vision"] = True
        if "other model file" in self.lies:
            props["model_path"] = "/models/other.gguf"
        for lie in self.lies:
            if lie.startswith("props "):
                props["rwkv_ms"][lie.removeprefix("props ")] = "0" * 64
        return props

    def models(self) -> dict[str, Any]:
        name = "another-model" if "other model" in self.lies else str(self.model)
        return {"object": "list", "data": [] if "no model" in self.lies else [{"id": name}]}

    def slot_list(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for slot in self.slots:
            point = {"given": slot.given, "n_text": len(slot.text), "origin": None}
            norms = [float(slot.memory.value)] * len(self.sidecar.layers)
            memory = {"tokens_written": slot.memory.tokens, "current_state": 0, "norms": norms, "frozen": False}
            busy = slot.id > 0 and "others are busy" in self.lies
            found.append({"id": slot.id, "speculative": "speculates" in self.lies, "is_processing": busy})
            if "base only" not in self.lies and not (slot.id and "memory in slot 0 alone" in self.lies):
                found[-1]["rwkv_ms"] = {**memory, **point, "frozen": slot.frozen, "scale": slot.scale}
        return found

    # -- what it does

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        slot, setting = self.slots[body.get("id_slot", 0)], body.get("rwkv_ms", {})
        prompt, n = body["prompt"], body["n_predict"]
        scale = float(setting.get("scale", 1.0))
        if "deaf to scale" in self.lies:
            scale = 1.0
        if "memory" in setting:
            slot.aside = slot.aside or Slot(slot.id)
            slot, origin = slot.aside, self.decode(setting["memory"])
            if origin != slot.origin:
                slot.clear(origin)
        if scale != slot.scale:
            slot.clear(slot.origin)
            slot.scale = scale
        asked = body.get("cache_prompt", "reuses unasked" in self.lies or self.profile != "serial")
        if not asked or not slot.text or prompt[: len(slot.text)] != slot.text or len(prompt) == len(slot.text):
            slot.clear(slot.origin)
        reused = len(slot.text)
        for token in prompt[reused:]:
            read = self.feed(slot, token)
        tokens, choices = [], []
        for i in range(n):
            if i:
                read = self.feed(slot, tokens[-1])
            top = self.likeliest(slot, read)
            tokens.append(top[0]["id"])
            choices.append({"id": top[0]["id"], "top_logprobs": top})
        timings = {"prompt_n": len(prompt) - reused, "cache_n": reused, "predicted_n": n}
        return {"content": "hello", "tokens": tokens, "completion_probabilities": choices, "timings": timings}

    def feed(self, slot: Slot, token: int) -> int:
        """Reads the memory, then writes to it; what was read."""
        read = 0 if "disconnected" in self.lies or not slot.scale else slot.memory.value
        slot.text.append(token)
        if "writes nothing" not in self.lies:
            slot.memory.write(token)
        return read

    def likeliest(self, slot: Slot, read: int) -> list[dict[str, Any]]:
        jitter = 0.0
        if {"unrepeatable", "jitter"} & self.lies:
            self._noise += 1
            jitter = self._noise % 7 / 500
        if "echo" in self.lies and not read:  # something of the deltas is left when the memory is empty
            read = 1 if slot.scale else 0
        seed = _hash("logits", *slot.text, read, slot.salt, self._noise if "unrepeatable" in self.lies else 0)
        ids = np.random.default_rng(seed).permutation(np.arange(10, VOCABULARY))[:20]
        return [{"id": int(id), "logprob": -1.0 - i - seed % 997 / 997 + jitter} for i, id in enumerate(ids)]

    def chat(self, body: dict[str, Any]) -> dict[str, Any]:
        text = " ".join(message["content"] for message in body["messages"])
        setting = {name: body[name] for name in ("id_slot", "rwkv_ms") if name in body}
        answer = self.complete({**setting, "prompt": tokenize(text, True), "n_predict": 4})
        message = {"role": "assistant", "content": "\n" if "silent" in self.lies else "Hello."}
        verbose = {"tokens": answer["tokens"]}
        usage = {"prompt_tokens": len(tokenize(text, True))}
        return {"choices": [{"message": message}], "usage": usage, "__verbose": verbose}

    def act(self, action: str, id_slot: int, body: dict[str, Any]) -> dict[str, Any]:
        slot, path = self.slots[id_slot], self.slot_dir / body.get("filename", "")
        if action == "erase":
            if "erases text alone" in self.lies:
                slot.text, slot.origin = [], replace(slot.memory)
            else:
                slot.clear()
                slot.scale, slot.frozen, slot.given = 1.0, False, False
        elif action == "memory-set":
            slot.scale, slot.frozen = body["scale"], body["frozen"]
        elif action == "memory-save":
            if "cannot save" in self.lies:
                raise Refused("no space left on device", 500)
            return {"id_slot": id_slot, "memory": base64.b64encode(self.encode(slot, whole=False)).decode()}
        elif action == "save":
            if "cannot save" in self.lies:
                raise Refused("no space left on device", 500)
            path.write_bytes(self.encode(slot, whole=True))
        elif action == "memory-restore":
            slot.clear(self.decode(body["memory"], slot))
            slot.given = True
        else:
            self.restore(slot, path)
        return {"id_slot": id_slot}

    def encode(self, slot: Slot, *, whole: bool) -> bytes:
        s = self.sidecar
        S = np.zeros((1, len(s.layers), s.heads, s.states, s.rank, s.rank), np.float32)
        S[..., 0, 0, 0] = slot.memory.value
        prev = np.zeros((1, len(s.layers), s.heads * s.rank), np.float32)
        tokens = np.full((1, len(s.layers)), slot.memory.tokens)
        alone = encode_state(State(S, prev, tokens, s.chunk, s.semantics, *self.loaded))
        return sequence_of(alone, slot.text) if whole else alone

    def decode(self, memory: str | None, slot: Slot | None = None) -> Memory:
        """The memory in a request: of `slot`, in an action."""
        if memory is None:
            return Memory()
        try:
            state = decode_state(base64.b64decode(memory), identity=self.loaded)
        except LlamamemError as e:
            self.refuse(e, slot, "a request")
            return Memory()
        return Memory(int(state.tokens_written[0, 0]), int(state.S[0, 0, 0, 0, 0, 0]))

    def refuse(self, e: LlamamemError, slot: Slot | None, what: str) -> None:
        """Raises, unless it lies."""
        believed = {"state-checksum": "accepts damaged", "state-identity": "accepts foreign"}.get(str(e.reason))
        if believed in self.lies:
            return
        if slot is not None:
            if "clears on refusal" in self.lies:
                slot.clear()
            if "forgets on refusal" in self.lies:
                slot.text = []
            if "no rollback line" not in self.lies:
                with self.log.open("a") as log:
                    log.write(f"9 W memory: slot {slot.id}: rolled back, nothing is changed: [{e.reason}] {what}\n")
        reason = "state-format" if "wrong reason" in self.lies and e.reason != "state-unreadable" else e.reason
        status = 500 if "500 on refusal" in self.lies and e.reason == "state-checksum" else 400
        raise Refused(f"Unable to restore slot: [{reason}] {e}", status) from None

    def restore(self, slot: Slot, path: Path) -> None:
        try:
            state = read_state(path, identity=self.loaded, kinds=(SEQUENCE,))
        except LlamamemError as e:
            self.refuse(e, slot, str(path))
            return
        slot.clear()
        if "restore without memory" not in self.lies:
            slot.memory = Memory(int(state.tokens_written[0, 0]), int(state.S[0, 0, 0, 0, 0, 0]))
        if "restores another KV cache" in self.lies:
            slot.salt = 1
        if "stock restore" not in self.lies:  # answers 200, and processes all of the next prompt again
            slot.text = state.token_ids.tolist()

    def answer(self, method: str, path: str, query: dict[str, list[str]], body: dict[str, Any]) -> Any:
        self.asked.append(path)
        what = path.split("/")[1] if path.startswith("/slots/") else path
        if f"hangs in {what}" in self.lies:
            self.hold.wait(60)
        if f"dies in {what}" in self.lies:
            raise ConnectionError
        if f"nonsense in {what}" in self.lies:
            return ["nonsense"]
        if f"500 in {what}" in self.lies:
            raise Refused("out of order", 500)
        if path.startswith("/slots/"):
            with self.working:
                return self.act(query["action"][0], int(path.removeprefix("/slots/")), body)
        answers: dict[str, Callable[[], Any]] = {
            "/health": lambda: {"status": "ok"},
            "/props": self.props,
            "/v1/models": self.models,
            "/slots": self.slot_list,
            "/tokenize": lambda: {"tokens": tokenize(body["content"], body.get("add_special", False))},
            "/detokenize": lambda: {"content": "Hello."},
            "/apply-template": lambda: {"prompt": " ".join(m["content"] for m in body["messages"])},
            "/completion": lambda: self.complete(body),
            "/v1/chat/completions": lambda: self.chat(body),
        }
        return answers[path]()

    def _handler(server) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # an answer goes out at once, head and body

            def do_GET(self) -> None:
                self.handle_request({})

            def do_POST(self) -> None:
                self.handle_request(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def handle_request(self, body: dict[str, Any]) -> None:
                url = urlsplit(self.path)
                try:
                    status, value = 200, server.answer(self.command, url.path, parse_qs(url.query), body)
                except Refused as e:
                    status, value = e.status, {"error": {"code": e.status, "message": str(e)}}
                except ConnectionError:
                    self.close_connection = True
                    return
                data = json.dumps(value).encode()
                try:
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                    self.wfile.flush()
                except OSError:  # nobody waits any more
                    self.close_connection = True

            def log_message(self, format: str, *args: Any) -> None:
                pass

        return Handler


def tokenize(text: str, special: bool) -> list[int]:
    return [BOS] * special + [10 + ord(c) % 380 for c in text[::2]]


def sequence_of(alone: bytes, text: list[int]) -> bytes:
    """The file of a sequence, of its memory alone: llama-server's packed tokens, and something for a KV cache."""
    packed = [-1, 1, len(text), *text, 0]
    kv = hashlib.sha256(json.dumps(text).encode()).digest() * 8
    header = replace(Header.unpack(alone[12:332]), kind=SEQUENCE, kv_bytes=len(kv), checksum=bytes(32))
    block = bytearray(header.pack() + alone[332 : 332 + header.cell_bytes])
    block[CHECKSUM] = hashlib.sha256(block).digest()
    body = alone[:8] + struct.pack(f"<I{len(packed)}i", len(packed), *packed) + block + kv
    return body + struct.pack("<4sIQ", b"RMVE", 1, len(body)) + hashlib.sha256(body).digest()


def _hash(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "little")
