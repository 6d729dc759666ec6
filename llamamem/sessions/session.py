"""A session: a memory by name, outside of the server."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from llamamem.errors import LlamamemError

MAX_NAME = 200  # characters


class Conversation(BaseModel):
    """The open conversation of a session: hashes that tell whether a request goes on with it, and no text.

    Only the gateway looks into it (`llamamem.gateway.turns`); a store keeps it as it is.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["messages", "prompt"] = "messages"
    id: str | None = None  # that the client gave it
    first: str | None = None  # hash of its first user message
    asked: str | None = None  # hash of all that was said before its last answer, without instructions
    exchanges: tuple[str, ...] = ()  # of what was asked and answered, hashes, the newest last
    only: bool = True  # its text now has one exchange


class Generation(BaseModel):
    """One saved memory. Times are UTC, hashes SHA-256 in hex; without a saved memory the hashes are None."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    generation: int = Field(default=0, ge=0)
    tokens: int = Field(default=0, ge=0)  # written to its memory
    n_bytes: int = Field(default=0, ge=0)  # of its state file
    state_sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    sidecar_sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    base_sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    saved: AwareDatetime | None = None  # None: by an older llamamem, or not yet
    conversation: Conversation | None = None  # that is open; then the memory is that after its last answer
    origin_sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")  # of the file it began on; None: empty
    origin_bytes: int = Field(default=0, ge=0)


class Session(Generation):
    """The metadata of a session, and of the generation before, whose memory is kept too.

    `created` and `generation` together name one version of it: every save counts the generation up, and a session that
    was removed and made again was created at another time.
    """

    format: Literal["llamamem_session.v1"] = "llamamem_session.v1"
    name: str
    created: AwareDatetime
    used: AwareDatetime
    parent: str | None = None  # the session that it was started from
    before: Generation | None = None


@dataclass(frozen=True)
class Memory:
    """A memory-only state file, checked, and what of it a session records."""

    data: bytes
    tokens: int
    sidecar_sha256: str
    base_sha256: str


@dataclass(frozen=True)
class Entry:
    """One line of a store's list. `label` is the name, or the place of what is too damaged to have one."""

    label: str
    session: Session | None
    fault: str | None = None


class Conflict(LlamamemError):
    """Another writer changed the session in between. Nothing was saved."""

    def __init__(self, loaded: Session, found: Session) -> None:
        if loaded.created != found.created:
            what = "it was removed and made again"
        else:
            what = f"another writer saved generation {found.generation} over {loaded.generation}"
        super().__init__(
            f"session {loaded.name!r}: {what} since it was resumed; nothing was saved, resume it again", exit_status=1
        )


class Missing(LlamamemError):
    """The store has no session of that name."""

    def __init__(self, name: str, location: str) -> None:
        super().__init__(f"session {name!r}: not in {location}; `llamamem session start` makes one")


def now() -> datetime:
    return datetime.now(timezone.utc)


def check_name(name: str) -> str:
    if not name.strip():
        raise LlamamemError("a session needs a name that can be seen")
    if len(name) > MAX_NAME:
        raise LlamamemError(f"session {name[:40]!r}...: the name has {len(name)} characters, {MAX_NAME} are allowed")
    if not name.isprintable():
        raise LlamamemError(f"session {name!r}: the name has a character that cannot be printed")
    return name


def new_session(name: str, source: Session | None) -> Session:
    """A session of now, which has the memory of `source` if one is given."""
    time = now()
    if source is None:
        return Session(name=name, created=time, used=time)
    own = {"name": name, "created": time, "used": time, "generation": 0, "parent": source.name, "before": None}
    closed = {"conversation": None, "origin_sha256": None, "origin_bytes": 0}
    return source.model_copy(update=own | closed)


def next_version(
    found: Session,
    loaded: Session,
    memory: Memory,
    conversation: Conversation | None = None,
    origin: bytes | None = None,
) -> Session:
    """What `save` makes of the version that the store has. Raises Conflict when that is not the loaded one."""
    if (found.created, found.generation) != (loaded.created, loaded.generation):
        raise Conflict(loaded, found)
    time = now()
    saved = Generation(
        generation=found.generation + 1,
        tokens=memory.tokens,
        n_bytes=len(memory.data),
        state_sha256=hashlib.sha256(memory.data).hexdigest(),
        sidecar_sha256=memory.sidecar_sha256,
        base_sha256=memory.base_sha256,
        saved=time,
        conversation=conversation,
        origin_sha256=None if origin is None else hashlib.sha256(origin).hexdigest(),
        origin_bytes=len(origin or b""),
    )
    return _succeeded(found, saved, time)


def undone(found: Session, location: str) -> Session:
    """What `undo` makes of the version that the store has."""
    if found.before is None:
        raise LlamamemError(
            f"session {found.name!r} in {location}: has no generation before this one; one is kept whenever it is saved"
        )
    time = now()
    return _succeeded(found, found.before.model_copy(update={"generation": found.generation + 1}), time)


def _succeeded(found: Session, saved: Generation, time: datetime) -> Session:
    before = Generation.model_construct(**{name: getattr(found, name) for name in Generation.model_fields})
    return found.model_copy(update={**dict(saved), "used": time, "before": before})


def read_session(text: bytes | str) -> Session:
    """Raises Damaged when it is not the metadata of a session."""
    try:
        session = Session.model_validate_json(text)
        check_name(session.name)
    except ValidationError as e:
        fault = e.errors()[0]
        member = ".".join(str(part) for part in fault["loc"]) or "it"
        raise Damaged(f"its metadata is damaged: {member}: {fault['msg']}") from None
    except LlamamemError as e:
        raise Damaged(f"its metadata is damaged: {e}") from None
    return session


def check_state(session: Generation, state: bytes | None) -> None:
    """Raises Damaged when this is not the state that the metadata is about."""
    if session.state_sha256 is None:
        if state is not None:
            raise Damaged("it has a state that its metadata does not know of")
    elif state is None:
        raise Damaged(MISSING)
    elif hashlib.sha256(state).hexdigest() != session.state_sha256:
        raise Damaged(WRONG_BYTES)


MISSING = "its state is missing: it is half-removed, or was taken away"
WRONG_BYTES = "its state is damaged: the bytes do not have the hash in its metadata"
WRONG_LENGTH = "its state is damaged: it has not the length in its metadata, let alone the hash"


class Damaged(Exception):
    """What is wrong with a session: the end of a sentence that names it."""


def damaged(name: str, location: str, fault: Damaged) -> LlamamemError:
    return LlamamemError(
        f"session {name!r} in {location}: {fault}; put it back from a backup, or give it up with `llamamem session rm`"
    )


def taken(name: str, location: str) -> LlamamemError:
    return LlamamemError(f"session {name!r}: is in {location} already; take another name, or resume that one")
