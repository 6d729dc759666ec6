"""Sessions on a running server: their memories in requests, or in its slots."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
from pydantic import BaseModel, Field, ValidationError

from llamamem.errors import LlamamemError
from llamamem.formats.state import Identity, State, decode_state, encode_state, origin_sha256
from llamamem.serving.client import Client, decoded_memory, encoded_memory
from llamamem.serving.slots import held
from llamamem.sessions import resumed
from llamamem.sessions.resumed import Point, Resumed
from llamamem.sessions.session import Memory, Missing, Session

Prompt = str | list[int] | list[dict[str, Any]]

_OURS = ("stream", "n", "n_cmpl")
_SETTING = {"frozen": False, "scale": 1.0}


class Served(NamedTuple):
    """What a server serves: identity and shape of its memory, the base's numbers of the layers that have one."""

    identity: Identity
    n_slots: int
    layers: tuple[int, ...]
    empty: bytes  # the memory of a conversation in which nothing was said
    run: str | None  # tells this run of the server from others, where it says so


class Kept(Protocol):
    """What of a SessionStore is needed here, which a gateway has as well."""

    @property
    def location(self) -> str: ...
    def create(self, name: str, from_: str | None = None) -> Session: ...
    def load(self, name: str) -> tuple[Session, bytes | None]: ...
    def save(self, session: Session, memory: Memory) -> Session: ...
    def remove(self, name: str) -> None: ...


class Sessions:
    """`Sessions(client, store)`. A turn takes any slot, and any of several servers behind one URL.

    `resume` and `save` are for who talks to one slot without this class: a note of what is in it is kept for the next
    process. `run_id` tells this run of the server from a later one at the same address. Every method raises
    LlamamemError; what the server refused is in it as the server said it.
    """

    def __init__(self, client: Client, store: Kept, *, run_id: str | None = None, wait: float = 60) -> None:
        self.client = client
        self.store = store
        self.run_id = run_id
        self.wait = wait  # seconds, for a slot that another process is at

    def start(self, name: str, from_: str | None = None) -> Session:
        """A new session, with no memory or with a copy of that of another. The server is not asked."""
        return self.store.create(name, from_)

    def load(self, name: str) -> tuple[Session, bytes | None]:
        """The session and its memory, if it is one of what the server serves."""
        return self._load(name, self.served())

    def keep(self, name: str, data: bytes, session: Session | None = None, *, force: bool = False) -> Session:
        """Saves a memory as the next generation of `session`, or as a new session of that name.

        One of that name that is not `session` is refused, unless `force` is given.
        """
        memory = self._checked(data, self.served())
        if session is not None and session.name == name and not force:
            return self.store.save(session, memory)
        try:
            found, _ = self.store.load(name)
        except Missing:
            made = self.store.create(name)
            try:
                return self.store.save(made, memory)
            except BaseException:
                self.store.remove(name)
                raise
        if not force:
            raise LlamamemError(
                f"session {name!r}: is in {self.store.location} already, and this conversation does not go on from it;"
                " nothing was saved; take another name, or save it with --force"
            )
        return self.store.save(found, memory)

    def turn(self, name: str, prompt: Prompt, **options: Any) -> dict[str, Any]:
        """Asks on the memory of the session, and keeps the memory after it: the server's answer.

        A prompt is text or token ids, for /completion, or a list of messages, for /v1/chat/completions, and only what
        is new: what was said in earlier turns is in the memory. `options` are fields of the request. With
        `rwkv_ms={"frozen": True}` the memory is read and nothing is saved. When it raises, the session is as it was.
        """
        if taken := sorted(set(options) & set(_OURS)):
            raise LlamamemError(f"a turn sets {', '.join(taken)} itself; leave it out")
        setting = {**_SETTING, **options.pop("rwkv_ms", {})}
        served = self.served()
        session, state = self._load(name, served)
        writes = not setting["frozen"]
        request = {**options, "rwkv_ms": {**setting, "memory": encoded_memory(state), "return_memory": writes}}
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], dict):
            answer = self.client.chat(prompt, **request)
        else:
            answer = self.client.completion(prompt, **request)  # type: ignore[arg-type]
        if writes:
            memory = self._checked(decoded_memory(answer.get("rwkv_ms"), str(self.client.url)), served)
            _check_turn(session, state, memory, answer)
            self.store.save(session, memory)
            del answer["rwkv_ms"]["memory"]
        return answer

    def resume(self, name: str, slot: int) -> Session:
        """Drops text and memory of the slot, whose next text starts at position 0 on the memory of the session."""
        with self._held(slot):
            served = self._of_slot(slot)
            session, state = self._load(name, served)
            resumed.forget(self._server, slot)
            # an empty memory is given too: the slot is this session's then, and nobody's who names none
            memory = served.empty if state is None else state
            restored = self.client.give_memory(slot, memory).get("tokens_written")
            if restored != session.tokens:
                raise LlamamemError(
                    f"session {name!r}: has {session.tokens} tokens, but slot {slot} of {self.client.url} came back"
                    f" with {restored}; do not use the slot, and see the server's log"
                )
            self._note(slot, served, session, Point(origin=origin_sha256(memory)))
        return session

    def save(self, name: str, slot: int, *, force: bool = False) -> Session:
        """Keeps the memory of the slot as the next generation of the session that was resumed in it.

        The slot must have gone on from where it was resumed or saved last, which the server knows; else nothing is
        saved. Raises Conflict when another writer saved since then. `force` takes whatever the slot holds for the
        newest version. A session that never had a memory needs no resume before its first save.
        """
        with self._held(slot):
            served = self._of_slot(slot)
            session, point = self._goes_on(name, slot, served, force)
            try:
                data, answer = self.client.take_memory(slot, continues=None if point is None else point.model_dump())
            except LlamamemError as e:
                if e.reason != "state-continues":
                    raise
                raise LlamamemError(
                    f"session {name!r}: slot {slot} does not go on from what was resumed or saved in it last: {e};"
                    " nothing was saved; resume the session again, or save what the slot holds with --force",
                    reason=e.reason,
                ) from None
            memory = self._checked(data, served)
            try:
                now = Point.model_validate(answer)
            except ValidationError:
                raise LlamamemError(f"{self.client.url}: the answer says not what was saved; {_OLDER}") from None
            saved = self.store.save(session, memory)
            self._note(slot, served, saved, now)
        return saved

    def reset(self, slot: int) -> None:
        """Drops text and memory of the slot, which holds no session then; what was saved stays."""
        with self._held(slot):
            self._of_slot(slot)
            resumed.forget(self._server, slot)
            self.client.reset_memory(slot)

    def served(self) -> Served:
        """Refuses a server without a memory, and one that takes none in a request."""
        try:
            props = _Props.model_validate(self.client.props())
        except ValidationError as e:
            raise LlamamemError(f"{self.client.url}: its /props are not those of this llama-server: {e}") from None
        if (memory := props.rwkv_ms) is None:
            raise LlamamemError(f"{self.client.url}: serves no memory; start it with --sidecar")
        if not {"memory", "continues"} <= set(memory.features):
            raise LlamamemError(f"{self.client.url}: takes no memory in a request; {_OLDER}")
        identity = Identity(memory.sidecar_sha256, memory.base_sha256)
        n, heads, rank = len(memory.layers), memory.state_heads, memory.rank
        empty = State(
            np.zeros((1, n, heads, memory.states, rank, rank), np.float32),
            np.zeros((1, n, heads * rank), np.float32),
            np.zeros((1, n), np.int64),
            memory.chunk,
            memory.semantics,
            *identity,
        )
        run = memory.run or self.run_id
        return Served(identity, props.total_slots, tuple(memory.layers), encode_state(empty), run)

    @property
    def _server(self) -> str:
        return str(self.client.url).rstrip("/")

    def _of_slot(self, slot: int) -> Served:
        served = self.served()
        if not 0 <= slot < served.n_slots:
            raise LlamamemError(f"slot {slot}: {self.client.url} has {served.n_slots}, counted from 0")
        return served

    def _load(self, name: str, served: Served) -> tuple[Session, bytes | None]:
        session, state = self.store.load(name)
        if state is not None and (session.sidecar_sha256, session.base_sha256) != served.identity:
            raise LlamamemError(
                f"session {name!r}: [state-identity] is of sidecar {session.sidecar_sha256} and base"
                f" {session.base_sha256}, {self.client.url} serves sidecar {served.identity.sidecar_sha256} and base"
                f" {served.identity.base_sha256}; serve what the session was made with",
                reason="state-identity",
            )
        return session, state

    def _checked(self, data: bytes, served: Served) -> Memory:
        state = decode_state(data, identity=served.identity)
        return Memory(data, int(state.tokens_written.max()), state.sidecar_sha256, state.base_sha256)

    def _goes_on(self, name: str, slot: int, served: Served, force: bool) -> tuple[Session, Point | None]:
        """The version that a save of this slot replaces, and where the slot must have gone on from."""
        noted = resumed.noted(self._server, slot)
        again = noted is not None and (noted.run or served.run) != (served.run or noted.run)
        if not force and noted and (noted.store, noted.session.name) == (self.store.location, name):
            if again or not self._is_given(slot):
                raise LlamamemError(
                    f"session {name!r}: [state-continues] slot {slot} was reset since it was resumed, or the server"
                    " started again; nothing was saved; resume the session again, or save what the slot holds with"
                    " --force",
                    reason="state-continues",
                )
            return noted.session, noted.point
        if again:
            noted = None
        session, state = self.store.load(name)
        if force:
            return session, None
        if noted is None and state is None:
            return session, Point(origin=None)
        holds = f"holds session {noted.session.name!r} of {noted.store}" if noted else "holds no session"
        raise LlamamemError(
            f"session {name!r}: slot {slot} {holds}; nothing was saved; resume {name!r} there before you talk to it, or"
            " save what the slot holds with --force"
        )

    def _is_given(self, slot: int) -> bool:
        """What was resumed gave the slot a memory. In a server that was started again it has none, and would look like
        one that was given an empty one."""
        state = next((entry.get("rwkv_ms") for entry in self.client.slots() if entry.get("id") == slot), None) or {}
        return state.get("given") is not False

    def _note(self, slot: int, served: Served, session: Session, point: Point) -> None:
        resumed.note(
            Resumed(
                server=self._server,
                run=served.run,
                slot=slot,
                store=self.store.location,
                session=session,
                point=point,
            )
        )

    @contextlib.contextmanager
    def _held(self, slot: int) -> Iterator[None]:
        try:
            with held(self._server, slot, self.wait):
                yield
        except OSError as e:
            raise LlamamemError(
                f"{e.filename or 'the notes of what was resumed'}: cannot be read or written ({e.strerror or e}); make"
                " room, or set XDG_STATE_HOME"
            ) from None


_OLDER = "it is of an older build: `llamamem build`, then start it again"


def _check_turn(session: Session, state: bytes | None, memory: Memory, answer: dict[str, Any]) -> None:
    """The memory must have gone on from that of the session, by this turn's tokens and no others.

    The last generated token is written with the next one that follows it, which here never comes.
    """
    try:
        timings = _Timings.model_validate(answer.get("timings"))
    except ValidationError:
        raise LlamamemError(
            f"session {session.name!r}: the answer has no timings to check; nothing was saved"
        ) from None
    began, origin = answer["rwkv_ms"].get("origin"), origin_sha256(state) if state is not None else None
    least = session.tokens + timings.prompt_n + timings.cache_n
    if began != origin or not least <= memory.tokens <= least + timings.predicted_n:
        raise LlamamemError(
            f"session {session.name!r}: the answer began on memory {began}, not on {origin}, and went from"
            f" {session.tokens} to {memory.tokens} tokens in a turn of {timings.prompt_n + timings.cache_n} +"
            f" {timings.predicted_n}; nothing was saved; see the server's log"
        )


class _Timings(BaseModel):
    prompt_n: int
    predicted_n: int
    cache_n: int = 0


class _RwkvMs(BaseModel):
    sidecar_sha256: str = Field(pattern="^[0-9a-f]{64}$")
    base_sha256: str = Field(pattern="^[0-9a-f]{64}$")
    features: list[str] = []
    layers: list[int] = []
    state_heads: int = 1
    states: int = 1
    rank: int = 1
    chunk: int = 1
    semantics: int = 1
    run: str | None = None


class _Props(BaseModel):
    total_slots: int
    rwkv_ms: _RwkvMs | None = None
