"""The routes of llama-server that generate: what a request says in each, and what its answer said."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from llamamem.gateway.naming import SPELLINGS
from llamamem.gateway.turns import Answer, Asked, Message, hashed, message_hash

Kind = Literal["chat", "completions", "completion", "responses", "messages", "infill"]

GENERATES: dict[str, Kind] = {
    "/v1/chat/completions": "chat",
    "/chat/completions": "chat",
    "/v1/completions": "completions",
    "/completion": "completion",
    "/completions": "completion",
    "/v1/responses": "responses",
    "/responses": "responses",
    "/v1/messages": "messages",
    "/infill": "infill",
}

TOLD = tuple(f'"{spelling}":'.encode() for spelling in SPELLINGS)

# what anybody with a key may ask of the server beside them; all else is for operators
PLAIN = {
    ("GET", "/models"),
    ("GET", "/v1/models"),
    ("GET", "/props"),
    ("GET", "/"),
    *(("POST", path) for path in ("/tokenize", "/detokenize", "/apply-template")),
    *(("POST", path) for path in ("/embedding", "/embeddings", "/v1/embeddings")),
    *(("POST", path) for path in ("/rerank", "/reranking", "/v1/rerank", "/v1/reranking")),
    *(("POST", path) for path in ("/v1/audio/transcriptions", "/audio/transcriptions")),
    *(("POST", f"{path}/input_tokens") for path in ("/chat/completions", "/v1/chat/completions")),
    *(("POST", f"{path}/input_tokens") for path in ("/responses", "/v1/responses")),
    ("POST", "/v1/messages/count_tokens"),
}

# Bytes that stand in the first event of an answer's end, and in none before: in a text quotes are escaped. The last
# event is known by what it tells of the memory; a client may hang up at one of the others, and take that for the end.
ENDS: dict[Kind, tuple[bytes, ...]] = {
    "chat": (b'"finish_reason":"', *TOLD),
    "completions": (b'"finish_reason":"', *TOLD),
    "completion": (b'"stop":true', *TOLD),
    "infill": (b'"stop":true', *TOLD),
    "responses": (b'"response.completed"', *TOLD),
    "messages": (b'"message_delta"', b'"message_stop"', *TOLD),
}


def asked(kind: Kind, body: Mapping[str, Any]) -> Asked:
    """What a request says. One that cannot be is left to the server to refuse."""
    if kind in ("completion", "completions"):
        prompt = body.get("prompt")
        if isinstance(prompt, list) and len(prompt) == 1:  # the same to the server
            prompt = prompt[0]
        return Asked(prompt=prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True))
    if kind == "infill":
        said = {name: body.get(name) for name in ("input_extra", "prompt", "input_prefix", "input_suffix")}
        return Asked(prompt=json.dumps(said, sort_keys=True))
    turns = body.get("input" if kind == "responses" else "messages")
    turns = [{"role": "user", "content": turns}] if isinstance(turns, str) else turns
    found = [m for turn in turns if isinstance(turn, dict) for m in _read(turn)] if isinstance(turns, list) else []
    return Asked(tuple(found))


def answer(kind: Kind, body: Mapping[str, Any]) -> Answer:
    """What was said in an answer that came in one piece."""
    if kind in ("completion", "infill"):
        return Answer(text=str(body.get("content") or ""))
    if kind == "completions":
        return Answer(text=str(_first(body.get("choices")).get("text") or ""))
    if kind == "chat":
        turns = [_first(body.get("choices")).get("message")]
    elif kind == "messages":
        turns = [{"role": "assistant", "content": body.get("content")}]
    else:
        turns = list(body.get("output") or [])
    found = [m for turn in turns if isinstance(turn, dict) for m in _read({"role": "assistant", **turn})]
    return Answer(tuple(message.hash for message in found))


@dataclass
class Listener:
    """Hears the events of a stream, and knows at its end what was said. `last` is what they told of the memory."""

    kind: Kind
    last: dict[str, Any] | None = None
    error: bool = False
    _text: list[str] = field(default_factory=list)
    _calls: dict[int, list[str]] = field(default_factory=dict)  # name, arguments
    _whole: dict[str, Any] | None = None

    def hear(self, event: Mapping[str, Any]) -> None:
        self.error = self.error or "error" in event or event.get("type") == "error"
        if (told := told_in(event)) is not None:
            self.last = told
        _HEARS[self.kind](self, event)

    def answer(self) -> Answer:
        text = "".join(self._text)
        if self.kind in ("completion", "completions", "infill"):
            return Answer(text=text)
        if self.kind == "responses":
            return answer("responses", self._whole or {})
        calls = [(name, _arguments(said)) for _, (name, said) in sorted(self._calls.items())]
        return Answer((message_hash(text, (), calls),))

    def _chat(self, event: Mapping[str, Any]) -> None:
        delta = _first(event.get("choices")).get("delta") or {}
        self._text.append(delta.get("content") or "")
        for call in delta.get("tool_calls") or []:
            known = self._calls.setdefault(int(call.get("index", 0)), ["", ""])
            function = call.get("function") or {}
            known[0] += function.get("name") or ""
            known[1] += function.get("arguments") or ""

    def _completions(self, event: Mapping[str, Any]) -> None:
        self._text.append(_first(event.get("choices")).get("text") or "")

    def _completion(self, event: Mapping[str, Any]) -> None:
        self._text.append(event.get("content") or "")

    def _responses(self, event: Mapping[str, Any]) -> None:
        if isinstance(event.get("response"), dict):
            self._whole = event["response"]

    def _messages(self, event: Mapping[str, Any]) -> None:
        index, block, delta = event.get("index"), event.get("content_block") or {}, event.get("delta") or {}
        if block.get("type") == "tool_use" and isinstance(index, int):
            self._calls[index] = [str(block.get("name")), ""]
        self._text.append(delta.get("text") or "")
        if isinstance(index, int) and index in self._calls:
            self._calls[index][1] += delta.get("partial_json") or ""


_HEARS: dict[Kind, Callable[[Listener, Mapping[str, Any]], None]] = {
    "chat": Listener._chat,
    "completions": Listener._completions,
    "completion": Listener._completion,
    "infill": Listener._completion,
    "responses": Listener._responses,
    "messages": Listener._messages,
}


def told_in(answer: Mapping[str, Any]) -> dict[str, Any] | None:
    """What an answer, or the last object of one, tells of the memory."""
    response = answer.get("response")
    for place in (answer, response if isinstance(response, dict) else {}):
        for spelling in SPELLINGS:
            if isinstance(place.get(spelling), dict):
                return place[spelling]
    return None


def events_of(chunk: bytes) -> Iterator[dict[str, Any]]:
    """The objects of some whole events."""
    for line in chunk.split(b"\n"):
        if line.startswith(b"data:") and (data := line[5:].strip()) != b"[DONE]":
            try:
                event = json.loads(data)
            except ValueError:
                continue
            if isinstance(event, dict):
                yield event


def _read(turn: Mapping[str, Any]) -> Iterator[Message]:
    """A message, or an item of /v1/responses; none of an instruction or a thought."""
    kind, role = turn.get("type", "message"), turn.get("role")
    if kind == "function_call":
        yield Message("assistant", message_hash("", (), [(str(turn.get("name")), _arguments(turn.get("arguments")))]))
    elif kind == "function_call_output":
        yield Message("tool", message_hash("", [turn.get("output")]))
    elif role in ("user", "assistant", "tool", "function"):
        texts, parts, calls = _content(turn.get("content"))
        made = turn.get("tool_calls")
        for call in made if isinstance(made, list) else []:
            function = call.get("function") if isinstance(call, dict) else None
            if isinstance(function, dict):
                calls.append((str(function.get("name")), _arguments(function.get("arguments"))))
        mine = "assistant" if role == "assistant" else "user" if role == "user" else "tool"
        yield Message(mine, message_hash("".join(texts), parts, calls))  # type: ignore[arg-type]


def _content(content: Any) -> tuple[list[str], list[Any], list[tuple[str, Any]]]:
    """Texts, other parts, tools that are called."""
    if not isinstance(content, list):
        return [content if isinstance(content, str) else ""], [], []
    texts, parts, calls = [], [], []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(part, str) or (isinstance(part, dict) and isinstance(part.get("text"), str)):
            texts.append(part if isinstance(part, str) else part["text"])
        elif kind == "tool_use":
            calls.append((str(part.get("name")), part.get("input")))
        elif isinstance(part, dict) and kind not in ("thinking", "redacted_thinking"):
            known = {name: value for name, value in part.items() if name != "cache_control"}
            parts.append(hashed(json.dumps(known, sort_keys=True)))
    return texts, parts, calls


def _arguments(said: Any) -> Any:
    """As a value: clients write the same JSON in other words. None of no arguments."""
    try:
        return (json.loads(said) if isinstance(said, str) and said.strip() else said) or None
    except (ValueError, RecursionError):
        return said


def _first(values: Any) -> dict[str, Any]:
    return values[0] if isinstance(values, list) and values and isinstance(values[0], dict) else {}
