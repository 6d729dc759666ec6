"""A llama-server in pure Python, as docs and contract have it: a memory is a chain of hashes, a model says hashes.

It reuses states as the real one does, of slots and of a cache, by one key: origin, setting, text. Each name in FAULTS
plants one of the mistakes that the real one could make; `tools/entitlement.py` must find every one.
"""

from __future__ import annotations

import base64
import io
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from entitled.memory import EMPTY, HEAD, PLAIN, Memory, Setting, text_hash
from entitled.wire import NoAnswer, Reply

from llamamem.errors import LlamamemError
from llamamem.formats.state import State, encode_state
from llamamem.formats.state.block import read_raw

FAULTS = {
    "sticky": "a slot's memory answers requests that name none",
    "sticky setting": "a slot's setting holds for requests that do not name it",
    "origin not in the key": "text is reused whatever memory it was read on",
    "frozen not in the key": "text is reused whether or not it was written",
    "scale not in the key": "text is reused whatever the scale",
    "reset keeps text": "after memory-reset the old text goes on as if read on nothing",
    "slot numbers wrap": "slot 99 is slot 3",
    "n takes slots": "the children of n take what other slots were given",
    "a stranger is learnt": "requests that name no slot are written to the memory of the one they ran in",
    "carried is kept": "a memory in a request becomes the slot's own",
    "null is the slot's": "a memory of null names the slot's own",
    "save of the older": "once another request used the slot, a save writes the memory that the slot was given",
    "save goes empty": "once another request used the slot, a save writes an empty memory",
    "setting outlives erase": "memory-set holds for whoever comes after an erase",
    "setting outlives restore": "memory-set holds on the next memory too",
    "slot file forgets setting": "text that was read at scale 0 goes on at scale 1",
    "slot file forgets origin": "a restored slot starts its next text on nothing",
    "saves need not continue": "a save is done whatever it says that it continues",
    "refused save writes": "a save that is refused has written its file",
    "late actions": "an action for a busy slot runs after the requests that were sent after it",
    "ghost actions": "an action runs whose client has hung up",
    "messages without": "/v1/messages drops rwkv_ms and id_slot",
    "streams without": "the last object of a stream has no rwkv_ms",
    "nan": "a memory comes back with a NaN",
    "one more": "a memory comes back with the last sampled token in it",
    "bad memory taken": "a damaged memory in a request is an empty one",
    "bad setting taken": "what is wrong in rwkv_ms is left out",
    "sleep forgets": "what a slot learnt is gone after a sleep",
    "cancelled is lost": "a cancelled request leaves the slot with an empty memory",
    "wrong report": "the origin in an answer is that of the slot",
    "crashes": "huge values end the server",
}

WORDS = "ok that is a fine boat anna baker carl cook".split()


def word_ids(text: str) -> list[int]:
    words = re.findall(r"<[^>]+>|\w+|[^\w ]", text)
    return [2 if word == "<bos>" else 10 + zlib.crc32(word.encode()) % 10**6 for word in words]


WORD_IDS = [word_ids(word)[0] for word in WORDS]
SPOKEN = dict(zip(WORD_IDS, (f" {word}" for word in WORDS), strict=True))


class Point(NamedTuple):
    """The state after some tokens: what is in the memory, how many were written, what the text was."""

    memory: int
    written: int
    text: int = 0

    def then(self, token: int, setting: Setting) -> Point:
        text = mixed(self.text, token)
        if setting.frozen:
            return Point(self.memory, self.written, text)
        return Point(mixed(self.memory, token + int(1000 * setting.scale) * 7919), self.written + 1, text)

    def says(self, setting: Setting) -> int:
        n = mixed(self.text, 1 if setting.scale == 0 else mixed(self.memory, int(100 * setting.scale))) >> 40
        return 1 if n % 13 == 0 else WORD_IDS[n % len(WORD_IDS)]


def mixed(state: int, token: int) -> int:
    state = ((state ^ token) * 0x9E3779B97F4A7C15 + 0x1B873593) & (1 << 64) - 1
    return (state ^ state >> 29) * 0xBF58476D1CE4E5B9 & (1 << 64) - 1


@dataclass(frozen=True)
class Text:
    """Tokens, on an origin, under a setting; the state after each of them."""

    origin: Memory = EMPTY
    setting: Setting = PLAIN
    ids: tuple[int, ...] = ()
    points: tuple[Point, ...] = ()

    def memory(self) -> Memory:
        """The origin's own bytes as long as nothing was written to it."""
        if not self.points or (self.origin.data and self.points[-1].written == self.origin.written):
            return self.origin
        return memory_of(self.points[-1].memory, self.points[-1].written)

    def with_ids(self, ids: tuple[int, ...]) -> Text:
        points = list(self.points)
        for token in ids:
            points.append((points[-1] if points else start_of(self.origin)).then(token, self.setting))
        return replace(self, ids=(*self.ids, *ids), points=tuple(points))


@lru_cache(4096)
def memory_of(state: int, written: int) -> Memory:
    """The file of a state; of none of it for nothing written."""
    values = (
        np.random.default_rng(state).standard_normal(20).astype(np.float32) if written else np.zeros(20, np.float32)
    )
    S, prev = values[:16].reshape(1, 1, 1, 1, 4, 4), values[16:].reshape(1, 1, 4)
    return Memory(encode_state(State(S, prev, np.array([[written]]), 1024, 1, "0" * 64, "1" * 64)))


def start_of(origin: Memory) -> Point:
    return Point(int(origin.origin[:16], 16) if origin.origin else 0, origin.written)


NO_TEXT = Text()


@dataclass
class Slot:
    own: Text = NO_TEXT
    setting: Setting = PLAIN
    given: bool = False
    live: Text = NO_TEXT  # what can be reused
    used: bool = False  # by others, since it was named


class Refusal(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class FakePending:
    """A request that was sent. A stream keeps its slot until somebody waits for its end."""

    def __init__(self, server: FakeServer, run: Callable[[], Reply]) -> None:
        self.server, self.run, self.reply, self.pieces, self.closed = server, run, None, 0, False

    def first(self) -> None:
        self.server.streaming = self

    def events(self, n: int) -> None:
        self.pieces = n

    def ended(self) -> bool:
        return self.reply is not None

    def close(self) -> None:
        self.closed = True
        if self.pieces:
            self.server.cut = self.pieces
            self.go()

    def go(self) -> None:
        if self.reply is None:
            self.reply = self.run()

    def result(self) -> Reply:
        self.server.catch_up(self)
        self.go()
        assert self.reply is not None
        return self.reply


class FakeServer:
    def __init__(self, n_slots: int = 1, fault: str = "") -> None:
        assert not fault or fault in FAULTS
        self.n_slots, self.fault, self.log, self.dead = n_slots, fault, "", False
        self.files: dict[str, Any] = {}
        self.kept: dict[str, Any] = {}
        self.start([])

    # -- what a driver needs

    def start(self, extra: list[str], *, again: bool = False) -> None:
        if again:
            self.files = dict(self.kept)
        self.kept = dict(self.files)
        self.slots, self.cache = [Slot() for _ in range(self.n_slots)], list[Text]()
        self.streaming: FakePending | None = None
        self.waiting: list[tuple[bool, FakePending]] = []  # is it an action
        self.cut, self.turn, self.dead = 0, 0, False

    def begin(self, method: str, path: str, body: Any = None) -> FakePending:
        pending = FakePending(self, lambda: self.handle(method, path, body))
        if self.streaming:
            self.waiting.append(("action=" in path, pending))
            pending.timeout = (body or {}).get("timeout")  # type: ignore[attr-defined]
        elif not (body or {}).get("stream"):
            pending.go()
        return pending

    def call(self, method: str, path: str, body: Any = None) -> Reply:
        return self.begin(method, path, body).result()

    def catch_up(self, wanted: FakePending) -> None:
        """The stream that is under way ends, and what waited for its slot follows: actions before requests."""
        if self.streaming is None:
            return
        first, self.streaming = self.streaming, None
        first.go()
        order = sorted(self.waiting, key=lambda one: one[0] == (self.fault == "late actions"))
        self.waiting = []
        for is_action, pending in order:
            if is_action and getattr(pending, "timeout", None):
                pending.reply = Reply(409, {"error": {"message": "[slot-busy]"}})
            elif not pending.closed or self.fault == "ghost actions":
                pending.go()

    def wait(self, seconds: float) -> None:
        if seconds > 1 and self.fault == "sleep forgets":
            self.slots = [Slot() for _ in self.slots]

    def file(self, name: str) -> bytes:
        data: bytes = self.files[name].data
        return data

    # -- requests

    def handle(self, method: str, path: str, body: Any) -> Reply:
        if self.dead:
            raise NoAnswer("connection refused")
        try:
            if path == "/tokenize":
                return Reply(200, {"tokens": word_ids(body["content"])})
            if path == "/slots":
                return Reply(200, [{"rwkv_ms": self.told(slot)} for slot in self.slots])
            if path.startswith("/slots/"):
                number, _, action = path.removeprefix("/slots/").partition("?action=")
                return Reply(200, self.act(self.slot(int(number)), action, body) | {"id_slot": int(number)})
            return self.generate(path, body)
        except Refusal as e:
            return Reply(e.status, {"error": {"message": str(e)}})

    def slot(self, number: Any) -> Slot:
        if self.fault == "slot numbers wrap" and isinstance(number, int):
            number %= self.n_slots
        if not isinstance(number, int) or not 0 <= number < self.n_slots:
            raise Refusal(400, "no such slot")
        return self.slots[number]

    def told(self, slot: Slot) -> dict[str, Any]:
        own = {"origin": slot.own.origin.origin, "n_text": len(slot.own.ids), "text": text_hash(slot.own.ids)}
        return {"tokens_written": slot.own.memory().written, **slot.setting._asdict(), "given": slot.given, **own}

    def parsed(self, data: Any) -> tuple[Memory | None, bool | None, float | None]:
        """Memory (None: not named), frozen, scale."""
        try:
            if not isinstance(data, dict) or set(data) - {"memory", "return_memory", "frozen", "scale"}:
                raise Refusal(400, "rwkv_ms")
            frozen, scale, memory = data.get("frozen"), data.get("scale"), data.get("memory")
            wrong = frozen not in (None, True, False) or isinstance(frozen, int) != isinstance(frozen, bool)
            if wrong or not isinstance(scale, int | float | None) or abs(scale or 0) > 16:
                raise Refusal(400, "rwkv_ms")
        except Refusal:
            if self.fault == "bad setting taken":
                return None, None, None
            raise
        if "memory" not in data or (memory is None and self.fault == "null is the slot's"):
            return None, frozen, scale
        return self.memory(memory), frozen, scale

    def memory(self, data: Any) -> Memory:
        try:
            if data is None:
                return EMPTY
            memory = Memory(base64.b64decode(data, validate=True))
            read_raw(io.BytesIO(memory.data), len(memory.data))
            return memory if memory.origin else EMPTY
        except (TypeError, ValueError, LlamamemError) as e:
            if self.fault == "bad memory taken":
                return EMPTY
            raise Refusal(400, f"the memory: {e}") from None

    def generate(self, route: str, body: dict[str, Any]) -> Reply:
        data, number, n = body.get("rwkv_ms", {}), body.get("id_slot", -1), body.get("n", 1)
        if self.fault == "messages without" and route == "/v1/messages":
            data, number = {}, -1
        named = None if number == -1 else self.slot(number)
        memory, frozen, scale = self.parsed(data)
        data = data if isinstance(data, dict) else {}
        if n > 1 and data.get("return_memory"):
            raise Refusal(400, "return_memory with n")
        ids = self.prompt(route, body)
        if len(ids) > 1000:
            raise Refusal(400, "too long")
        self.turn += 1
        free = [slot for slot in self.slots if not slot.given] or self.slots
        slot = named or (self.slots if self.fault == "sticky" else free)[self.turn % len(free)]
        others = [one for one in (self.slots if self.fault == "n takes slots" else free) if one is not slot]
        if len(others) < n - 1:
            raise Refusal(400, "not as many slots")
        own = named is not None and memory is None
        base = slot.setting if own or self.fault == "sticky setting" else PLAIN
        if memory is None:
            memory = slot.own.origin if own or self.fault == "sticky" else EMPTY
        if memory.data and not np.abs(memory.values).max() < 1e30:
            self.dead = self.fault == "crashes"
            raise Refusal(500, "[state-values] not finite")
        text, reused = self.read(slot, memory, base.under(frozen, scale), ids)
        limit = min(body.get("n_predict", body.get("max_tokens", body.get("max_output_tokens", 9))), self.cut or 999)
        self.cut, cut = 0, self.cut
        tokens: list[int] = []
        while len(tokens) < limit:
            token = text.points[-1].says(text.setting)
            token = WORD_IDS[0] if token == 1 and body.get("ignore_eos") else token
            tokens.append(token)
            if token == 1 or len(tokens) == limit:
                break
            text = text.with_ids((token,))
        self.keep(slot, text, own, cut)
        for child in others[: n - 1]:
            child.live, child.used = text, True
            if self.fault == "n takes slots" and child.given:
                child.own, child.given = Text(), False
        after = text.with_ids((tokens[-1],)) if self.fault == "one more" else text
        origin = slot.own.origin if self.fault == "wrong report" else memory
        told = {"origin": origin.origin, "tokens_written": text.memory().written, "reused": reused}
        if data.get("return_memory"):
            told["memory"] = after.memory().base64
            if self.fault == "nan" and self.turn % 5 == 0 and after.memory().data:
                told["memory"] = not_finite(after.memory()).base64
        said = [token for token in tokens if token != 1]
        return reply_of(route, body, said, len(tokens), told if "rwkv_ms" in body else None, self.fault)

    def prompt(self, route: str, body: dict[str, Any]) -> tuple[int, ...]:
        if "prompt" in body:
            prompt = body["prompt"]
            return tuple(prompt) if isinstance(prompt, list) else (2, *word_ids(prompt))
        turns = body.get("messages", body.get("input"))
        turns = [{"role": "user", "content": turns}] if isinstance(turns, str) else turns
        text = "<bos>"
        for turn in turns:
            said = turn["content"] if isinstance(turn["content"], str) else turn["content"][0]["text"]
            text += f"<|turn>{'model' if turn['role'] == 'assistant' else 'user'}\n{said}<turn|>\n"
        return tuple(word_ids(text + "<|turn>model\n"))

    def read(self, slot: Slot, origin: Memory, setting: Setting, ids: tuple[int, ...]) -> tuple[Text, int]:
        """The text read, as much as possible of it not again."""
        best, n = Text(origin, setting), 0
        for known in (slot.live, *self.cache):
            same = known.origin.origin == origin.origin or self.fault == "origin not in the key"
            same &= known.setting.frozen == setting.frozen or self.fault == "frozen not in the key"
            same &= known.setting.scale == setting.scale or self.fault == "scale not in the key"
            shared = next((i for i, (a, b) in enumerate(zip(known.ids, ids)) if a != b), min(len(known.ids), len(ids)))  # noqa: B905
            if same and shared > n:
                best, n = Text(origin, setting, ids[:shared], known.points[:shared]), shared
        return best.with_ids(ids[n:]), n

    def keep(self, slot: Slot, text: Text, own: bool, cut: int) -> None:
        self.cache = [*self.cache, slot.live][-4:]
        slot.live = text
        if own:
            slot.own, slot.used = slot.own if text.setting.frozen else text, text.setting.frozen
            if self.fault == "cancelled is lost" and cut and not text.setting.frozen:
                slot.own = Text(text.origin, text.setting)
            return
        slot.used = True
        if self.fault == "a stranger is learnt" or (self.fault == "carried is kept" and text.origin.origin):
            slot.own = text

    # -- slot actions

    def act(self, slot: Slot, action: str, body: dict[str, Any]) -> dict[str, Any]:
        name = body.get("filename")
        if name is not None and "/" in name:
            raise Refusal(400, "Invalid filename")
        if action == "memory-save":
            return self.save(slot, body)
        if action == "memory-restore":
            memory = self.memory(body["memory"]) if "memory" in body else self.files.get(name)
            if memory is None:
                raise Refusal(400, "[state-unreadable]")
            setting = slot.setting if self.fault == "setting outlives restore" else PLAIN
            slot.own, slot.given, slot.setting, slot.live = Text(memory), bool(memory.origin), setting, Text()
            return {"tokens_written": memory.written}
        if action in ("memory-reset", "erase"):
            setting = slot.setting if self.fault == "setting outlives erase" else PLAIN
            live = replace(slot.live, origin=EMPTY) if self.fault == "reset keeps text" else Text()
            slot.own, slot.given, slot.setting, slot.live = Text(), False, setting, live
            return {}
        if action == "memory-set":
            _, frozen, scale = self.parsed(body)
            slot.setting = slot.setting.under(frozen, scale)
            return slot.setting._asdict()
        if action == "save":
            self.files[str(name)] = slot.own
            return {}
        if action == "restore":
            if (saved := self.files.get(str(name))) is None:
                raise Refusal(400, "[state-unreadable]")
            if self.fault == "slot file forgets setting":
                saved = replace(saved, setting=PLAIN)
            slot.own, slot.given, slot.setting, slot.live = saved, bool(saved.origin.origin), PLAIN, saved
            if self.fault == "slot file forgets origin":
                slot.own = replace(saved, origin=EMPTY)
            return {}
        raise Refusal(400, "Invalid action")

    def save(self, slot: Slot, body: dict[str, Any]) -> dict[str, Any]:
        own, wanted = slot.own, body.get("continues")
        if self.fault == "save of the older" and slot.used:
            own = Text(own.origin, own.setting)
        if self.fault == "save goes empty" and slot.used:
            own = Text()
        memory = own.memory() if own.memory().data else memory_of(0, 0)
        if wanted and self.fault != "saves need not continue":
            n = wanted["n_text"]
            holds = wanted["origin"] == own.origin.origin and n <= len(own.ids)
            if not holds or wanted["text"] != text_hash(own.ids[:n]):
                if self.fault == "refused save writes" and "filename" in body:
                    self.files[body["filename"]] = memory
                raise Refusal(409, "[state-continues] another memory")
        told = {"tokens_written": memory.written, "n_bytes": len(memory.data), "origin": own.origin.origin}
        told |= {"n_text": len(own.ids), "text": text_hash(own.ids)}
        if "filename" in body:
            self.files[body["filename"]] = memory
            return told | {"filename": body["filename"]}
        return told | {"memory": memory.base64}


def not_finite(memory: Memory) -> Memory:
    data = bytearray(memory.data)
    data[HEAD : HEAD + 4] = np.float32("nan").tobytes()
    return Memory(bytes(data))


def reply_of(route: str, body: dict[str, Any], said: list[int], n_sampled: int, told: Any, fault: str) -> Reply:
    """The answer in the form of its route."""
    text, n = "".join(SPOKEN[token] for token in said), body.get("n", 1)
    last = {} if told is None else {"rwkv_ms": told}
    if not body.get("stream"):
        probabilities = [{"top_logprobs": [{"logprob": 0.0}, {"logprob": -9.0}]} for _ in said]
        if route == "/completion":
            one = {"content": text, "tokens": said, "tokens_predicted": n_sampled, **last}
            found = [{**one, "index": i, "completion_probabilities": probabilities} for i in range(n)]
            return Reply(200, found if n > 1 else found[0])
        if route == "/v1/messages":
            return Reply(200, {"content": [{"type": "text", "text": text}], **last})
        if route == "/v1/responses":
            return Reply(200, {"output": [{"content": [{"text": text}]}], **last})
        if route == "/v1/completions":
            return Reply(200, {"choices": [{"index": i, "text": text} for i in range(n)], **last})
        return Reply(200, {"choices": [{"index": i, "message": {"content": text}} for i in range(n)], **last})
    events: list[Any] = []
    last = {} if fault == "streams without" else last
    for i in range(n):
        for token in said:
            piece = SPOKEN[token]
            events.append(
                {
                    "/completion": {"index": i, "content": piece, "tokens": [token]},
                    "/v1/completions": {"choices": [{"index": i, "text": piece}]},
                    "/v1/chat/completions": {"choices": [{"index": i, "delta": {"content": piece}}]},
                    "/v1/responses": {"type": "response.output_text.delta", "delta": piece},
                    "/v1/messages": {"type": "content_block_delta", "delta": {"text": piece}},
                }[route]
            )
        end: dict[str, Any] = {"index": i, "content": "", "tokens": [], "choices": [], **last}
        if route == "/v1/responses":
            end = {"type": "response.completed", "response": {**last}}
        events.append(end)
    return Reply(200, None, events)
