"""A conversation in one slot of a running server: what was said, and the memory of it."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from llamamem.errors import LlamamemError
from llamamem.serving.client import Client, Delta
from llamamem.sessions.client import Sessions
from llamamem.sessions.session import Missing, Session

_OURS = ("id_slot", "cache_prompt")


@dataclass(frozen=True)
class SlotMemory:
    """The memory of a slot now. `norms` are those of the state of each of the `layers`, the base's numbers of them."""

    tokens_written: int
    layers: tuple[int, ...]
    norms: tuple[float, ...]
    frozen: bool
    scale: float


class Chat:
    """`Chat(client, slot=0, sessions=sessions)`; it starts with no text and an empty memory.

    Every turn sends the whole text: the server goes on from what the slot has when it is the same, and else reads the
    text again on the memory that the conversation began with, so that the memory is always the one of this text.
    Without `sessions` nothing can be saved or loaded. `options` are fields of each request. Methods raise
    LlamamemError, and then the conversation is as it was.
    """

    def __init__(
        self,
        client: Client,
        *,
        slot: int = 0,
        sessions: Sessions | None = None,
        system: str | None = None,
        **options: Any,
    ) -> None:
        if taken := sorted(set(options) & set(_OURS)):
            raise LlamamemError(f"a chat sets {', '.join(taken)} itself; leave it out")
        self.client = client
        self.slot = slot
        self.sessions = sessions
        self.session: Session | None = None
        self.messages: list[dict[str, str]] = []
        self.options = options
        self._system = [{"role": "system", "content": system}] if system else []
        self._props = client.props()
        n_slots = int(self._props.get("total_slots", 1))
        if not 0 <= slot < n_slots:  # the server itself would count round
            raise LlamamemError(f"--slot {slot}: {client.url} has {n_slots}, counted from 0")
        self.reset()

    @property
    def has_memory(self) -> bool:
        return isinstance(self._props.get("rwkv_ms"), dict)

    def ask(self, text: str) -> Generator[Delta, None, None]:
        """The answer, piece by piece. Closing the iterator ends it: what was said until then stays said."""
        turn = [*self.messages, {"role": "user", "content": text}]
        request = {**self.options, "id_slot": self.slot, "cache_prompt": True}
        said, whole = "", False
        try:
            with contextlib.closing(self.client.stream_chat([*self._system, *turn], **request)) as stream:
                for delta in stream:
                    said += delta.text
                    yield delta
            whole = True
        except LlamamemError:
            said = ""
            raise
        finally:
            if said or whole:
                self.messages = [*turn, {"role": "assistant", "content": said}]

    def reset(self) -> None:
        """Forgets all: the text, and the memory, that of a loaded session too. What was saved stays."""
        if self.has_memory and self.sessions is not None:
            self.sessions.reset(self.slot)
        elif self.has_memory:
            # Refused without a slot directory; but then no slot was ever given a memory to start a new text on.
            with contextlib.suppress(LlamamemError):
                self.client.erase_slot(self.slot)
        self.messages, self.session = [], None

    def memory(self) -> SlotMemory:
        """What the slot remembers now."""
        if not self.has_memory:
            raise LlamamemError(f"{self.client.url}: serves no memory; start it with --sidecar")
        slot = next(slot for slot in self.client.slots() if slot.get("id") == self.slot)["rwkv_ms"]
        return SlotMemory(
            tokens_written=slot["tokens_written"],
            layers=tuple(self._props["rwkv_ms"]["layers"]),
            norms=tuple(slot["norms"]),
            frozen=slot["frozen"],
            scale=slot["scale"],
        )

    def save(self, name: str, *, force: bool = False) -> Session:
        """Keeps the memory under that name, a new one or that of the session that was loaded or saved last.

        Any other session is refused unless `force` is given. The conversation goes on.
        """
        sessions = self._sessions("save")
        try:
            saved = sessions.save(name, self.slot, force=force)
        except Missing:
            sessions.start(name)
            try:
                saved = sessions.save(name, self.slot, force=True)  # whatever the slot began with: the name is new
            except BaseException:
                sessions.store.remove(name)
                raise
        self.session = saved
        return saved

    def load(self, name: str) -> Session:
        """Drops the text and goes on with the memory of the session, from position 0."""
        self.session = self._sessions("load").resume(name, self.slot)
        self.messages = []
        return self.session

    def _sessions(self, what: str) -> Sessions:
        if not self.has_memory:
            raise LlamamemError(f"{self.client.url}: serves no memory to {what}; start it with --sidecar")
        if self.sessions is None:
            raise LlamamemError(f"{self.client.url}: its slot directory is not known; give --slot-dir")
        return self.sessions
