"""Sessions in the slots of a running server."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
from pydantic import BaseModel, Field, ValidationError

from llamamem.errors import LlamamemError
from llamamem.formats.state import MEMORY, Identity, read_state
from llamamem.serving.client import Client
from llamamem.sessions.session import Memory, Session, SessionStore

Prompt = str | list[int] | list[dict[str, Any]]

_OURS = ("id_slot", "cache_prompt", "stream", "n", "n_cmpl")


class Sessions:
    """`Sessions(client, store, slot_dir)`: the server behind `client` has `slot_dir` as its --slot-save-path.

    A slot is held while something is done with it, against other processes too, but not against who asks the server
    without this class: leave the slots of sessions to sessions. `run_id` tells this run of the server from a later one
    on the same port. Every method raises LlamamemError; what the server refused is in it as the server said it.
    """

    def __init__(
        self, client: Client, store: SessionStore, slot_dir: str | Path, *, run_id: str | None = None, wait: float = 600
    ) -> None:
        self.client = client
        self.store = store
        self.slot_dir = Path(slot_dir)
        self.run_id = run_id
        self.wait = wait  # seconds, for a slot that is held

    def start(self, name: str, from_: str | None = None) -> Session:
        """A new session, with no memory or with a copy of that of another. The server is not asked."""
        return self.store.create(name, from_)

    def resume(self, name: str, slot: int) -> Session:
        """Drops text and memory of the slot, whose next text starts at position 0 on the memory of the session."""
        with self._held(slot):
            session = self._resume(name, slot, self._identity(slot))
            self._remember(slot, session)
        return session

    def save(self, name: str, slot: int, *, force: bool = False) -> Session:
        """Keeps the memory of the slot as the next generation of the session that was resumed in it.

        Raises Conflict when another writer saved since then. `force` takes whatever the slot holds for the newest
        version. A session that never had a memory needs no resume before its first save.
        """
        with self._held(slot):
            identity = self._identity(slot)
            loaded = self._loaded(name, slot, force)
            memory = self._take(slot, identity)
            if memory.tokens < loaded.tokens and not force:
                raise LlamamemError(
                    f"session {name!r}: slot {slot} remembers {memory.tokens} tokens, {loaded.tokens} were resumed; it"
                    " was reset since then and nothing was saved; resume the session again, or save it with --force"
                )
            saved = self.store.save(loaded, memory)
            self._remember(slot, saved)
        return saved

    def reset(self, slot: int) -> None:
        """Drops text and memory of the slot, which holds no session then; what was saved stays."""
        with self._held(slot):
            self._identity(slot)
            self._forget(slot)
            self.client.erase_slot(slot)

    def turn(self, name: str, prompt: Prompt, slot: int, **options: Any) -> dict[str, Any]:
        """Resume, ask, save: the server's answer. When it raises, the session is as it was.

        A prompt is text or token ids, for /completion, or a list of messages, for /v1/chat/completions, and only what
        is new: what was said in earlier turns is in the memory. `options` are fields of the request. With
        `rwkv_ms={"frozen": True}` the memory is read and nothing is saved.
        """
        if taken := sorted(set(options) & set(_OURS)):
            raise LlamamemError(f"a turn sets {', '.join(taken)} itself; leave it out")
        # a setting that somebody left on the slot must not change the answers of a session
        setting = {"frozen": False, "scale": 1.0, **options.pop("rwkv_ms", {})}
        request = {**options, "rwkv_ms": setting, "id_slot": slot, "cache_prompt": False}
        with self._held(slot):
            identity = self._identity(slot)
            session = self._resume(name, slot, identity)
            if isinstance(prompt, list) and prompt and isinstance(prompt[0], dict):
                answer = self.client.chat(prompt, **request)
            else:
                answer = self.client.completion(prompt, **request)  # type: ignore[arg-type]
            if not setting["frozen"]:
                memory = self._take(slot, identity)
                _check_turn(session, memory, answer, slot)
                self.store.save(session, memory)
        return answer

    def _resume(self, name: str, slot: int, identity: Identity) -> Session:
        session, state = self.store.load(name)
        if state is not None and (session.sidecar_sha256, session.base_sha256) != identity:
            raise LlamamemError(
                f"session {name!r}: [state-identity] is of sidecar {session.sidecar_sha256} and base"
                f" {session.base_sha256}, {self.client.url} serves sidecar {identity.sidecar_sha256} and base"
                f" {identity.base_sha256}; serve what the session was made with",
                reason="state-identity",
            )
        self._forget(slot)
        if state is None:
            self.client.erase_slot(slot)
            return session
        with self._file() as path:
            _write(path, state)
            restored = self.client.restore_memory(slot, path.name).get("tokens_written")
        if restored != session.tokens:
            raise LlamamemError(
                f"session {name!r}: has {session.tokens} tokens, but slot {slot} of {self.client.url} came back with"
                f" {restored}; do not use the slot, and see the server's log"
            )
        return session

    def _take(self, slot: int, identity: Identity) -> Memory:
        with self._file() as path:
            self.client.save_memory(slot, path.name)
            if not path.exists():
                raise LlamamemError(
                    f"{path}: the server did not write it there; {self.slot_dir} is not its --slot-save-path, give that"
                )
            state = read_state(path, identity=identity, kinds=(MEMORY,))
            return Memory(path.read_bytes(), int(state.tokens_written.max()), state.sidecar_sha256, state.base_sha256)

    def _loaded(self, name: str, slot: int, force: bool) -> Session:
        """The version that a save of this slot goes on from."""
        resumed = self._resumed(slot)
        if not force and resumed and (resumed.store, resumed.session.name) == (self.store.location, name):
            return resumed.session
        session, state = self.store.load(name)
        if force or (resumed is None and state is None):
            return session
        holds = f"holds session {resumed.session.name!r} of {resumed.store}" if resumed else "holds no session"
        raise LlamamemError(
            f"session {name!r}: slot {slot} {holds}; nothing was saved; resume {name!r} there before you talk to it, or"
            " save what the slot holds with --force"
        )

    def _identity(self, slot: int) -> Identity:
        """What the server serves. Refuses one without a memory, and a slot that it does not have."""
        try:
            props = _Props.model_validate(self.client.props())
        except ValidationError as e:
            raise LlamamemError(f"{self.client.url}: its /props are not those of this llama-server: {e}") from None
        if props.rwkv_ms is None:
            raise LlamamemError(f"{self.client.url}: serves no memory; start it with --sidecar")
        if not 0 <= slot < props.total_slots:  # the server itself would count round
            raise LlamamemError(f"slot {slot}: {self.client.url} has {props.total_slots}, counted from 0")
        return Identity(props.rwkv_ms.sidecar_sha256, props.rwkv_ms.base_sha256)

    # What slot holds which version is kept beside the slot files, for the next process.

    def _remember(self, slot: int, session: Session) -> None:
        resumed = _Resumed(run_id=self.run_id, store=self.store.location, session=session)
        with self._file() as part:
            _write(part, resumed.model_dump_json().encode())
            os.replace(part, self._beside(slot, "json"))

    def _forget(self, slot: int) -> None:
        self._beside(slot, "json").unlink(missing_ok=True)

    def _resumed(self, slot: int) -> _Resumed | None:
        try:
            resumed = _Resumed.model_validate_json(self._beside(slot, "json").read_bytes())
        except (FileNotFoundError, ValidationError):
            return None
        return resumed if resumed.run_id == self.run_id else None

    def _beside(self, slot: int, suffix: str) -> Path:
        # servers may share a directory; their ports differ
        # [TAG_SLOT_LOCK] llamamem/proof/health/slot.py knows the name of the lock
        return self.slot_dir / f".llamamem-{self.client.url.port or self.client.url.scheme}-slot-{slot}.{suffix}"

    @contextlib.contextmanager
    def _held(self, slot: int) -> Iterator[None]:
        if not self.slot_dir.is_dir():
            raise LlamamemError(f"{self.slot_dir}: no such directory; give the server's own --slot-dir")
        try:
            with filelock.FileLock(self._beside(slot, "lock"), timeout=self.wait):
                yield
        except filelock.Timeout:
            raise LlamamemError(
                f"slot {slot}: another process was at it for {self.wait:g} s; take another slot"
            ) from None
        except OSError as e:
            raise LlamamemError(
                f"{e.filename or self.slot_dir}: cannot be read or written ({e.strerror or e}); give the server's own"
                " --slot-dir"
            ) from None

    @contextlib.contextmanager
    def _file(self) -> Iterator[Path]:
        """A plain name in the slot directory that nobody else has; whatever happens, no file of it is left."""
        path = self.slot_dir / f"llamamem-{secrets.token_hex(8)}.state"
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)


def _write(path: Path, data: bytes) -> None:
    """A new file, readable by its owner alone."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)


def _check_turn(session: Session, memory: Memory, answer: dict[str, Any], slot: int) -> None:
    """The memory must have gone on from where it was resumed, by this turn's tokens and no others.

    The last generated token is written with the next one that follows it, which here never comes.
    """
    try:
        timings = _Timings.model_validate(answer.get("timings"))
    except ValidationError:
        raise LlamamemError(
            f"session {session.name!r}: the answer has no timings to check; nothing was saved"
        ) from None
    least = session.tokens + timings.prompt_n
    if timings.cache_n or not least <= memory.tokens <= least + timings.predicted_n:
        raise LlamamemError(
            f"session {session.name!r}: slot {slot} went from {session.tokens} to {memory.tokens} tokens in a turn of"
            f" {timings.prompt_n} + {timings.predicted_n} ({timings.cache_n} reused); something else used the slot, and"
            " nothing was saved; leave it to sessions and take the turn again"
        )


class _Timings(BaseModel):
    prompt_n: int
    predicted_n: int
    cache_n: int = 0


class _RwkvMs(BaseModel):
    sidecar_sha256: str = Field(pattern="^[0-9a-f]{64}$")
    base_sha256: str = Field(pattern="^[0-9a-f]{64}$")


class _Props(BaseModel):
    total_slots: int
    rwkv_ms: _RwkvMs | None = None


class _Resumed(BaseModel):
    run_id: str | None
    store: str
    session: Session
