"""What must come out: a server that was given just an origin, a setting and a text, and nothing else before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from entitled.memory import EMPTY, PLAIN, Memory, Setting

# rounding moves a logit of the demo model by less than 1e-2; a choice by a smaller margin than this one may turn
NEAR_TIE = 0.03


class Talks(Protocol):
    """A server, real or not."""

    def call(self, method: str, path: str, body: Any = None) -> Any: ...


@dataclass(frozen=True)
class Fresh:
    """An answer and the memory after it. `ids` are all tokens that are in the memory's text, of prompt and answer."""

    tokens: tuple[int, ...]
    margins: tuple[float, ...]  # of the first choice over the second, for each of them
    text: str
    ids: tuple[int, ...]
    memory: Memory


class Reference:
    """The second server. It has one slot and no caches; its memory is given and taken by slot actions alone."""

    def __init__(self, server: Talks) -> None:
        self._server = server
        self._known: dict[Any, Fresh] = {}
        self._ids: dict[str, tuple[int, ...]] = {}
        self.runs = 0

    def ids(self, text: str) -> tuple[int, ...]:
        """Token ids of a rendered text."""
        if text not in self._ids:
            body = {"content": text, "add_special": False, "parse_special": True}
            self._ids[text] = tuple(self._done("POST", "/tokenize", body)["tokens"])
        return self._ids[text]

    def answer(
        self, origin: Memory, setting: Setting, ids: tuple[int, ...], n: int, *, ignore_eos: bool = False
    ) -> Fresh:
        """At most n greedy tokens after that text, on that origin."""
        key = (origin.origin, setting, ids, n, ignore_eos)
        if key not in self._known:
            self._known[key] = self._answer(origin, setting, ids, n, ignore_eos)
        return self._known[key]

    def memory(self, origin: Memory, setting: Setting, ids: tuple[int, ...]) -> Memory:
        """The memory after that text: of no answer, since a token is not written before the next one follows."""
        return self.answer(origin, setting, ids, 1).memory if ids else origin

    def _answer(self, origin: Memory, setting: Setting, ids: tuple[int, ...], n: int, ignore_eos: bool) -> Fresh:
        self.runs += 1
        self._act("memory-reset", {})
        if origin.origin:
            self._act("memory-restore", {"memory": origin.base64})
        if setting != PLAIN:
            self._act("memory-set", setting._asdict())
        body = {"prompt": list(ids), "n_predict": n, "ignore_eos": ignore_eos, "n_probs": 2, "return_tokens": True}
        said = self._done("POST", "/completion", {**body, "cache_prompt": False, "temperature": 0.0, "id_slot": 0})
        memory = Memory.of(self._act("memory-save", {"return_memory": True})["memory"])
        tokens, margins = tuple(said["tokens"]), []
        for entry in said.get("completion_probabilities", []):
            best = entry["top_logprobs"]
            margins.append(best[0]["logprob"] - best[1]["logprob"] if len(best) > 1 else float("inf"))
        # an end of turn is sampled like the others, but is no part of the answer
        n_text = len(ids) + int(said["tokens_predicted"]) - 1
        return Fresh(tokens, tuple(margins), said["content"], (*ids, *tokens)[:n_text], memory if n_text else EMPTY)

    def _act(self, action: str, body: dict[str, Any]) -> Any:
        return self._done("POST", f"/slots/0?action={action}", body)

    def _done(self, method: str, path: str, body: Any) -> Any:
        reply = self._server.call(method, path, body)
        if reply.status != 200:
            raise RuntimeError(f"the reference server refuses {path}: {reply.error}")
        return reply.body
