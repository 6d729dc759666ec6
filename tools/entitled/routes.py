"""The routes that generate: how each is asked, and where its answer stands, in one piece or in a stream."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from entitled.memory import Memory
from entitled.wire import Reply

Text = tuple[str, ...]  # what was said by turns, the user first and last

COMPLETION, COMPLETIONS, CHAT, RESPONSES, MESSAGES = ROUTES = (
    *("/completion", "/v1/completions"),
    *("/v1/chat/completions", "/v1/responses", "/v1/messages"),
)
SEVERAL = (COMPLETION, COMPLETIONS, CHAT)  # take n
ABSENT = object()  # a memory that is not named, where None is null


@dataclass(frozen=True)
class Ask:
    """A request. Everything that decides its answer is in here, but for what a slot of its own holds."""

    route: str
    text: Text
    n_predict: int
    slot: int | None = None  # id_slot; None: absent
    memory: Any = ABSENT  # or None, or a Memory
    frozen: bool | None = None
    scale: float | None = None
    return_memory: bool = False
    report: bool = False  # an empty rwkv_ms object, where nothing else makes one
    n: int = 1
    stream: bool = False
    cache: bool | None = None  # cache_prompt
    as_ids: bool = False  # the prompt as token ids; /completion and /v1/completions alone
    ignore_eos: bool = False  # likewise
    cancel_after: int | None = None  # pieces of the stream

    @property
    def settles(self) -> bool:
        """Whether there is an rwkv_ms object, so that the answer has one."""
        return (
            self.report or self.return_memory or self.memory is not ABSENT or (self.frozen, self.scale) != (None,) * 2
        )

    def __str__(self) -> str:
        said = [self.route, f"n_predict={self.n_predict}"]
        said += [] if self.slot is None else [f"id_slot={self.slot}"]
        said += [] if self.memory is ABSENT else [f"memory={self.memory if self.memory else 'null'}"]
        for name in ("frozen", "scale", "cache", "cancel_after"):
            said += [] if getattr(self, name) is None else [f"{name}={getattr(self, name)}"]
        said += [name for name in ("return_memory", "report", "stream", "as_ids", "ignore_eos") if getattr(self, name)]
        said += [f"n={self.n}"] if self.n > 1 else []
        return " ".join(said) + "  " + " / ".join(self.text)


def rendered(text: Text) -> str:
    """As the chat template of the demo model has it."""
    turns = (f"<|turn>{('user', 'model')[i % 2]}\n{said}<turn|>\n" for i, said in enumerate(text))
    return "<bos>" + "".join(turns) + "<|turn>model\n"


def body_of(ask: Ask, ids: tuple[int, ...]) -> dict[str, Any]:
    """The JSON of the request; `ids` are those of its whole prompt."""
    roles = [("user", "assistant")[i % 2] for i in range(len(ask.text))]
    body: dict[str, Any] = {"temperature": 0.0, "top_k": 1}
    if ask.route in (COMPLETION, COMPLETIONS):
        body["prompt"] = list(ids) if ask.as_ids else rendered(ask.text).removeprefix("<bos>")
        body |= {"n_predict": ask.n_predict, "ignore_eos": ask.ignore_eos, "return_tokens": True}
    elif ask.route == RESPONSES:
        turns = [
            {"role": "user", "content": said}
            if role == "user"
            else {"role": role, "type": "message", "content": [{"type": "output_text", "text": said}]}
            for role, said in zip(roles, ask.text, strict=True)
        ]
        body |= {"input": turns, "max_output_tokens": ask.n_predict}
    else:
        body["messages"] = [{"role": role, "content": said} for role, said in zip(roles, ask.text, strict=True)]
        body["max_tokens"] = ask.n_predict
    body |= {"stream": True} if ask.stream else {}
    body |= {"n": ask.n} if ask.n > 1 else {}
    body |= {} if ask.slot is None else {"id_slot": ask.slot}
    body |= {} if ask.cache is None else {"cache_prompt": ask.cache}
    if ask.settles:
        body["rwkv_ms"] = {
            **({} if ask.memory is ABSENT else {"memory": ask.memory.base64 if ask.memory else None}),
            **({} if ask.frozen is None else {"frozen": ask.frozen}),
            **({} if ask.scale is None else {"scale": ask.scale}),
            **({"return_memory": True} if ask.return_memory else {}),
        }
    return body


class Said(NamedTuple):
    """One answer of a reply: what was said, its token ids where the route tells, and its rwkv_ms."""

    text: str
    tokens: tuple[int, ...] | None
    rwkv_ms: dict[str, Any] | None

    @property
    def memory(self) -> Memory | None:
        data = (self.rwkv_ms or {}).get("memory")
        return None if data is None else Memory.of(data)


def answers(ask: Ask, reply: Reply) -> list[Said]:
    """The answers of a reply, n of them, in the order of their indices."""
    if reply.events is not None:
        return _streamed(ask, reply.events)
    body = reply.body
    if ask.route == COMPLETION:
        found = sorted(body, key=lambda one: one["index"]) if isinstance(body, list) else [body]
        return [Said(one["content"], tuple(one["tokens"]), one.get("rwkv_ms")) for one in found]
    if ask.route in (COMPLETIONS, CHAT):
        choices = sorted(body["choices"], key=lambda one: one["index"])
        texts = [one["text"] if ask.route == COMPLETIONS else one["message"]["content"] or "" for one in choices]
        return [Said(text, None, body.get("rwkv_ms")) for text in texts]
    parts = body["content"] if ask.route == MESSAGES else [p for item in body["output"] for p in item["content"]]
    return [Said("".join(part["text"] for part in parts), None, body.get("rwkv_ms"))]


def _streamed(ask: Ask, events: list[Any]) -> list[Said]:
    texts, tokens, settings = [""] * ask.n, [()] * ask.n, [None] * ask.n  # type: list[str], list[Any], list[Any]
    for event in events:
        i, piece = _piece(ask, event)
        texts[i] += piece
        tokens[i] += tuple(event["tokens"]) if ask.route == COMPLETION else ()
        settings[i] = next(_settings(event), settings[i])
    if ask.n == 1:  # of the last object alone: elsewhere nobody looks for it
        settings = [next(_settings(events[-1]), None)] if events else [None]
    told = tokens if ask.route == COMPLETION else [None] * ask.n
    return [Said(*one) for one in zip(texts, told, settings, strict=True)]


def _piece(ask: Ask, event: dict[str, Any]) -> tuple[int, str]:
    """Of which answer an event is, and the text in it."""
    if ask.route == COMPLETION:
        return int(event.get("index", 0)), event["content"]
    if ask.route in (COMPLETIONS, CHAT):
        if not event.get("choices"):
            return 0, ""
        choice = event["choices"][0]
        text = choice["text"] if ask.route == COMPLETIONS else choice["delta"].get("content")
        return int(choice["index"]), text or ""
    if ask.route == RESPONSES:
        return 0, event["delta"] if event.get("type") == "response.output_text.delta" else ""
    return 0, event["delta"].get("text", "") if event.get("type") == "content_block_delta" else ""


def _settings(event: Any) -> Iterator[dict[str, Any]]:
    """The rwkv_ms of an event: its own, or that of the response in it."""
    for place in (event, event.get("response")):
        if isinstance(place, dict) and "rwkv_ms" in place:
            yield place["rwkv_ms"]
