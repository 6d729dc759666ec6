"""Which session a request names, which conversation of it, and what it may do to the memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import parse_qs, unquote_to_bytes

from llamamem.errors import LlamamemError
from llamamem.gateway.errors import Refusal
from llamamem.sessions.session import check_name

Mode = Literal["on", "read", "off"]
Spelling = Literal["rwkv_ms", "memory_adapter"]

SESSION_HEADERS = ("x-session-id", "x-litellm-session-id", "x-openclaw-session-key", "x-openwebui-user-id")
CONVERSATION_HEADERS = ("x-conversation-id", "x-openwebui-chat-id")
SPELLINGS: tuple[Spelling, ...] = ("rwkv_ms", "memory_adapter")  # of the member that is about the memory
OURS = ("session", "conversation", "mode")  # what of it the server does not know

_MAX_BYTES = 255
_MODE_HEADER = "x-memory"
_MODES: tuple[Mode, ...] = ("on", "read", "off")


@dataclass(frozen=True)
class Headers:
    """The headers that name a session and a conversation, the first that is there wins; lower case."""

    session: Sequence[str] = SESSION_HEADERS
    conversation: Sequence[str] = CONVERSATION_HEADERS


@dataclass(frozen=True)
class Path:
    """A request's path as the server is to see it, and the session of `/session/NAME/...` before it."""

    path: str
    session: str | None = None


@dataclass(frozen=True)
class Named:
    """`extras` is what the request's own member about the memory, spelled so, leaves for the server."""

    session: str | None
    conversation: str | None
    mode: Mode
    spelling: Spelling = "rwkv_ms"
    extras: dict[str, Any] = field(default_factory=dict)


def split_path(raw: bytes) -> Path:
    """Of the bytes of a request line. What two programs could read in two ways is refused."""
    try:
        parts = [unquote_to_bytes(part).decode() for part in raw.split(b"/")]
    except UnicodeDecodeError:
        raise Refusal(400, "the path is not UTF-8") from None
    if parts[0] or (len(parts) > 2 and "" in parts[1:-1]):
        raise Refusal(400, "the path has an empty part")
    session = None
    if len(parts) >= 3 and parts[1] == "session":
        session, parts = session_name(parts[2]), ["", *parts[3:]]
    for part in parts:
        if part in (".", "..") or not part.isprintable() or set(part) & set("/\\;?#%"):
            raise Refusal(400, "the path has a part that cannot be: dots, slashes or marks that are escaped")
    return Path("/".join(parts) or "/", session)


def session_name(name: object, *, what: str = "session") -> str:
    """Raises Refusal for what cannot be one."""
    if not isinstance(name, str):
        raise Refusal(400, f"the name of the {what} is not text", f"{what}-name")
    try:
        n_bytes = len(name.encode())
    except UnicodeEncodeError:
        raise Refusal(400, f"the name of the {what} is not Unicode", f"{what}-name") from None
    if n_bytes > _MAX_BYTES:
        raise Refusal(
            400, f"the name of the {what} has {n_bytes} bytes, at most {_MAX_BYTES} are allowed", f"{what}-name"
        )
    if "/" in name or "\\" in name or ".." in name or name == ".":
        raise Refusal(400, f"the name of the {what} has a slash, a backslash or two dots in it", f"{what}-name")
    try:
        return check_name(name)
    except LlamamemError as e:
        raise Refusal(400, f"the name of the {what}: {e}", f"{what}-name") from None


def named(
    path: Path, query: bytes, headers: Mapping[str, list[bytes]], body: Mapping[str, Any] | None, known: Headers
) -> Named:
    """Of a request that generates. Raises Refusal for a name that cannot be, and for what contradicts itself."""
    body = body or {}
    spelled = [spelling for spelling in SPELLINGS if spelling in body]
    if len(spelled) > 1:
        raise Refusal(400, "rwkv_ms and memory_adapter are one member with two names: give one of them")
    own = body[spelled[0]] if spelled else None
    ours = own if isinstance(own, dict) else {}
    session = path.session or _first(headers, known.session, "session") or _of_body(body, ours)
    conversation = _first(headers, known.conversation, "conversation")
    if conversation is None and ours.get("conversation") is not None:
        conversation = _short(str(ours["conversation"]), "rwkv_ms.conversation")
    extras = {name: value for name, value in ours.items() if name not in OURS}
    return Named(session, conversation, _mode(query, headers, ours), spelled[0] if spelled else "rwkv_ms", extras)


def _first(headers: Mapping[str, list[bytes]], names: Sequence[str], what: str) -> str | None:
    for name in names:
        values = [value for value in headers.get(name, []) if value.strip()]
        if len(set(values)) > 1:
            raise Refusal(400, f"{name} is there more than once", f"{what}-name")
        if values:
            try:
                value = values[0].strip().decode()
            except UnicodeDecodeError:
                raise Refusal(400, f"{name} is not UTF-8", f"{what}-name") from None
            # a conversation is a matter of comparison alone; its id may be anything
            return session_name(value, what=what) if what == "session" else _short(value, name)
    return None


def _short(value: str, name: str) -> str:
    if not value.isprintable() or len(value.encode()) > _MAX_BYTES:
        raise Refusal(400, f"{name}: give up to {_MAX_BYTES} bytes that can be printed", "conversation-name")
    return value


def _of_body(body: Mapping[str, Any], ours: Mapping[str, Any]) -> str | None:
    metadata = body.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    places = (
        ours.get("session"),
        metadata.get("session_id"),
        metadata.get("user_id"),
        body.get("prompt_cache_key"),
        body.get("user"),
    )
    name = next((place for place in places if place not in (None, "")), None)
    return None if name is None else session_name(name)


def _mode(query: bytes, headers: Mapping[str, list[bytes]], ours: Mapping[str, Any]) -> Mode:
    asked = set(parse_qs(query.decode("latin-1")).get("memory", []))
    asked |= {value.decode("latin-1").strip() for value in headers.get(_MODE_HEADER, [])}
    asked |= {str(ours["mode"])} if ours.get("mode") is not None else set()
    if len(asked) > 1:
        raise Refusal(400, "memory (of the query, X-Memory and rwkv_ms.mode) says two things")
    if asked - set(_MODES):
        raise Refusal(400, "memory (of the query, X-Memory or rwkv_ms.mode) is neither on nor read nor off")
    mode: Mode = next((mode for mode in _MODES if mode in asked), "on")
    return "read" if mode == "on" and ours.get("frozen") is True else mode
