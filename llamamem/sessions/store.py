"""What every store of sessions keeps and promises, for the command line and for the gateway."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import NamedTuple, Protocol

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from llamamem.errors import LlamamemError
from llamamem.sessions.session import Conversation, Entry, Memory, Session


class Record(NamedTuple):
    """A session with all that is kept of its newest version.

    `state` is the memory now, None before the first save. While a conversation is open (`session.conversation`),
    `origin` is the memory that it began on, None for an empty one; else it is None.
    """

    session: Session
    state: bytes | None
    origin: bytes | None


class Key(BaseModel):
    """A key of the API, which opens one namespace. The key itself is kept nowhere, only its SHA-256, in hex: it is 32
    random bytes, so that no slower hash is needed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str = Field(pattern="^[0-9a-f]{8,32}$")  # what lists and logs call it; tells nothing of the key
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    namespace: str
    label: str = ""
    operator: bool = False  # may use the server's own slots, and change what it serves
    created: AwareDatetime


class SessionStore(Protocol):
    """Sessions by name. Names are compared as they are: case and Unicode form count.

    Every change happens whole or not at all, also when the process dies in it. Where nothing can be written, what is
    there can be read all the same: then the time of its use is lost, and nothing else. A session that is damaged is
    listed with its fault and refused by `load` and `save`; only `remove` takes it away. With a quota (bytes of states
    and origins) a change that would exceed it is refused; nothing is ever removed to make room.

    A store is used by many threads and processes at once, and keeps no state of its own but connections. What it
    promises of acknowledged saves when it dies itself (nothing, all but the last second, all) is in the docstring of
    its class. Methods raise LlamamemError: Missing, Conflict, Busy, Unreachable and Full tell a gateway what to answer.
    """

    @property
    def location(self) -> str:
        """What names this store in messages, and tells it from others. Without passwords."""

    @property
    def namespace(self) -> str:
        """The one whose sessions these are; "" is that of who has no key, and all that older versions saved."""

    def within(self, namespace: str) -> SessionStore:
        """The same store, with the sessions of another namespace. Connections are shared, nothing is opened."""

    def close(self) -> None:
        """Ends its connections, those of what `within` gave included."""

    def create(self, name: str, from_: str | None = None) -> Session:
        """A session with no memory yet, or with a copy of the memory of another (never with its open conversation).
        The name must be free."""

    def load(self, name: str) -> tuple[Session, bytes | None]:
        """The session, with `used` set to now, and its state (None: nothing was saved yet)."""

    def read(self, name: str) -> Record:
        """All of the session, in one look; nothing is written. Raises Missing."""

    def lease(self, name: str, owner: str, seconds: float) -> Record | None:
        """Keeps other owners of leases away for so long, by the clock of the store, and reads, in one step. None: there
        is no session of that name; the name is kept all the same, for who will make it.

        An owner that has the lease gets it again, for `seconds` from now. Raises Busy while another has it. Only who
        asks for a lease is kept away: saves are put in order by generations. A lease need not outlive a crash of the
        store, so it costs no flush.
        """

    def release(self, name: str, owner: str) -> None:
        """Ends the lease, if it is still this owner's."""

    def save(
        self,
        session: Session,
        memory: Memory,
        *,
        conversation: Conversation | None = None,
        origin: bytes | None = None,
        new: bool = False,
    ) -> Session:
        """Replaces the memory of `session`, which is as `create`, `load`, `read`, `lease` or `save` gave it; returns
        its next version.

        With `conversation` it is left open, begun on `origin` (None: on an empty memory); without, none is open. What
        was replaced is kept whole as the generation before, and the one before that is gone. With `new`, `session` is
        of `new_session`, the store must have none of that name, and making and saving it is one step. Raises Conflict
        when the store has another version by now, Missing when it has none: a session that was removed stays removed.
        """

    def undo(self, name: str) -> Session:
        """Saves the generation before, its open conversation included, as the next one. Undone twice, all is as it
        was."""

    def entries(self, *, after: str | None = None, limit: int | None = None, verify: bool = False) -> list[Entry]:
        """The sessions of the namespace, the damaged ones included: all of them by name, or a page of them.

        A page has up to `limit` that follow the label `after` in the store's own order, and takes as long with 100,000
        sessions as with few. Without `verify` states are not read: one that has another length than it must have is
        found, one with other bytes is not.
        """

    def names(self, start: str, limit: int) -> list[str]:
        """Up to so many names that start so."""

    def remove(self, name: str) -> None:
        """Removes the session, damaged or not, and every copy of its memory. Its lease stays with its owner."""

    def prune(self, older_than: timedelta) -> list[str]:
        """Removes what was not used for that long, but for what is damaged; the names of the removed."""

    def total_bytes(self) -> int:
        """Bytes of the newest state and origin of each session, what the quota counts."""

    # of the whole store, whatever the namespace

    def removals(self) -> int:
        """A number that has grown whenever a session was removed: gateways look at it every few seconds, and have
        their servers forget what is cached. It is cheap, and raises Unreachable when the store is: a probe."""

    def keys(self) -> list[Key]:
        """The keys of the API."""

    def add_key(self, key: Key) -> None:
        """Its id must be free."""

    def remove_key(self, id: str) -> Key:
        """The key that is no longer one. Raises LlamamemError when there is none of that id."""


class Busy(LlamamemError):
    """Another owner has the lease of the session. `until` is when it ends, if that is known (UTC)."""

    def __init__(self, name: str, until: datetime | None = None) -> None:
        super().__init__(f"session {name!r}: another request is at it; try again", reason="session-busy")
        self.until = until


class Unreachable(LlamamemError):
    """The store does not answer, or cannot be read or written just now. Nothing is known to be saved."""

    def __init__(self, message: str) -> None:
        super().__init__(message, reason="store-unreachable")


class Full(LlamamemError):
    """The quota, or the room of the store. Nothing was saved."""

    def __init__(self, message: str) -> None:
        super().__init__(message, reason="store-full")
