"""A conversation on a running server: what was said, and the memory of it, which goes with every request."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import numpy as np

from llamamem.errors import LlamamemError
from llamamem.formats.state import decode_state
from llamamem.serving.client import Client, Delta, decoded_memory, encoded_memory
from llamamem.sessions.client import Served, Sessions
from llamamem.sessions.session import Session

_OURS = ("id_slot", "cache_prompt", "rwkv_ms")


@dataclass(frozen=True)
class ChatMemory:
    """The memory of a chat now. `norms` are those of the state of each of the `layers`, the base's numbers of them."""

    tokens_written: int
    layers: tuple[int, ...]
    norms: tuple[float, ...]


class Chat:
    """`Chat(client, sessions=sessions)`; it starts with no text and an empty memory.

    Every turn sends the whole text and the memory that it began on, so that no slot is anybody's: the server goes on
    from what a slot has when both are the same, and else reads the text again. Each answer brings the memory after it.
    Without `sessions` nothing can be saved or loaded. `slot` is one to be answered in, for who wants to choose.
    `options` are fields of each request. Methods raise LlamamemError, and then the conversation is as it was.
    """

    def __init__(
        self,
        client: Client,
        *,
        slot: int | None = None,
        sessions: Sessions | None = None,
        system: str | None = None,
        **options: Any,
    ) -> None:
        if taken := sorted(set(options) & set(_OURS)):
            raise LlamamemError(f"a chat sets {', '.join(taken)} itself; leave it out")
        self.client = client
        self.slot = slot
        self.sessions = sessions
        self.options = options
        self._system = [{"role": "system", "content": system}] if system else []
        props = client.props()
        self.has_memory = isinstance(props.get("rwkv_ms"), dict)
        n_slots = int(props.get("total_slots", 1))
        if slot is not None and not 0 <= slot < n_slots:
            raise LlamamemError(f"--slot {slot}: {client.url} has {n_slots}, counted from 0")
        self.reset()

    def reset(self) -> None:
        """Forgets all: the text, and the memory, that of a loaded session too. What was saved stays."""
        self.session: Session | None = None
        self.messages: list[dict[str, str]] = []
        self._origin: bytes | None = None  # the memory that the text began on
        self._memory: bytes | None = None  # after the last answer; None: not asked for yet

    def ask(self, text: str) -> Generator[Delta, None, None]:
        """The answer, piece by piece. Closing the iterator ends it: what was said until then stays said."""
        turn = [*self.messages, {"role": "user", "content": text}]
        said, whole, memory = "", False, None
        try:
            with contextlib.closing(self.client.stream_chat([*self._system, *turn], **self._request())) as stream:
                for delta in stream:
                    said += delta.text
                    if delta.rwkv_ms is not None and "memory" in delta.rwkv_ms:
                        memory = decoded_memory(delta.rwkv_ms, str(self.client.url))
                    yield delta
            whole = True
        except LlamamemError:
            said = ""
            raise
        finally:
            if said or whole:
                self.messages = [*turn, {"role": "assistant", "content": said}]
                self._memory = memory

    def memory(self) -> ChatMemory:
        """What is remembered now."""
        served = self._sessions("show").served()
        state = decode_state(self._now(served), identity=served.identity)
        norms = np.sqrt((state.S[0].astype(np.float64) ** 2).reshape(state.layers, -1).sum(axis=1))
        return ChatMemory(int(state.tokens_written.max()), served.layers, tuple(float(norm) for norm in norms))

    def save(self, name: str, *, force: bool = False) -> Session:
        """Keeps the memory under that name, a new one or that of the session that was loaded or saved last.

        Any other session is refused unless `force` is given. The conversation goes on.
        """
        sessions = self._sessions("save")
        self.session = sessions.keep(name, self._now(sessions.served()), self.session, force=force)
        return self.session

    def load(self, name: str) -> Session:
        """Drops the text and goes on with the memory of the session, from position 0."""
        session, memory = self._sessions("load").load(name)
        self.reset()
        self.session, self._origin = session, memory
        return session

    def _now(self, served: Served) -> bytes:
        """The memory after what was said; of an answer that was interrupted, after as much of it as came."""
        if not self.messages:
            return served.empty if self._origin is None else self._origin
        if self._memory is None:
            prompt = self.client.apply_template([*self._system, *self.messages], add_generation_prompt=False)
            answer = self.client.completion(prompt, n_predict=0, **self._request())
            self._memory = decoded_memory(answer.get("rwkv_ms"), str(self.client.url))
        return self._memory

    def _request(self) -> dict[str, Any]:
        request = {**self.options, "cache_prompt": True}
        if self.slot is not None:
            request["id_slot"] = self.slot
        if self.has_memory:
            request["rwkv_ms"] = {"memory": encoded_memory(self._origin), "return_memory": True}
        return request

    def _sessions(self, what: str) -> Sessions:
        if not self.has_memory:
            raise LlamamemError(f"{self.client.url}: serves no memory to {what}; start it with --sidecar")
        if self.sessions is None:
            raise LlamamemError(f"a chat without sessions has no memory to {what}; give it some")
        return self.sessions
