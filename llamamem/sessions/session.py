"""A session: the memory of one conversation by name, outside of the server. What every store keeps and promises."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Literal, Protocol

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from llamamem.errors import LlamamemError

MAX_NAME = 200  # characters


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


class SessionStore(Protocol):
    """Sessions by name. Names are compared as they are: case and Unicode form count.

    Every change happens whole or not at all, also when the process dies in it. Where nothing can be written, what is
    there can be read all the same: then the time of its use is lost, and nothing else. A session that is damaged is
    listed with its fault and refused by `load` and `save`; only `remove` takes it away. With a quota (bytes of
    states) a change that would exceed it is refused; nothing is ever removed to make room. Methods raise LlamamemError.
    """

    @property
    def location(self) -> str:
        """What names this store in messages, and tells it from others."""

    def create(self, name: str, from_: str | None = None) -> Session:
        """A session with no memory yet, or with a copy of the memory of another. The name must be free."""

    def load(self, name: str) -> tuple[Session, bytes | None]:
        """The session, with `used` set to now, and its state file (None: nothing was saved yet)."""

    def save(self, session: Session, memory: Memory) -> Session:
        """Replaces the state of `session`, which is as `create`, `load` or `save` gave it; returns its next version.

        The state that was replaced is kept as the generation before, and the one before that is gone. Raises Conflict
        when the store has another version by now.
        """

    def undo(self, name: str) -> Session:
        """Saves the generation before once more, as the next one. Undone twice, all is as it was."""

    def entries(self, *, after: str | None = None, limit: int | None = None, verify: bool = False) -> list[Entry]:
        """The sessions, the damaged ones included: all of them by name, or a page of them.

        A page has up to `limit` that follow the label `after` in the store's own order. Without `verify` states are
        not read: one that has another length than it must have is found, one with other bytes is not.
        """

    def names(self, start: str, limit: int) -> list[str]:
        """Up to so many names that start so."""

    def remove(self, name: str) -> None:
        """Removes the session, damaged or not, and every copy of its memory."""

    def prune(self, older_than: timedelta) -> list[str]:
        """Removes what was not used for that long, but for what is damaged; the names of the removed."""

    def total_bytes(self) -> int:
        """Bytes of the newest state of each session, what the quota counts."""


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
    return source.model_copy(update=own)


def next_version(found: Session, loaded: Session, memory: Memory) -> Session:
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
    before = Generation.model_validate(found.model_dump(include=set(Generation.model_fields)))
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


def check_quota(location: str, quota: int | None, total: int) -> None:
    if quota is not None and total > quota:
        raise LlamamemError(
            f"{location}: {total} bytes of states would be over the quota of {quota}; nothing was saved; make room with"
            " `llamamem session rm` or `prune`, or give a larger --quota"
        )
