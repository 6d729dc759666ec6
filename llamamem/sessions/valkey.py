"""Sessions in Valkey or Redis, 7.0 and later: a hash each, an ordered set of the names, one script a change."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, urlsplit

from llamamem.errors import LlamamemError
from llamamem.sessions.rows import Memories, Row, Rows, seen
from llamamem.sessions.session import Damaged, Entry, Session
from llamamem.sessions.store import Full, Unreachable

_TIMEOUT = 5.0  # seconds for a connection and for an answer
_LAYOUT = b"1"

# Compare and set: keys are the session, the names, the bytes used; see Rows._put for what it is told and tells.
_PUT = """#!lua
local expected, text, name, what = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local more, quota = tonumber(ARGV[5]), tonumber(ARGV[6])
local there = redis.call('HGET', KEYS[1], 'metadata')
if there == text then return {1} end
if expected == '' then
    if there or redis.call('ZSCORE', KEYS[2], name) then return {0} end
elseif there ~= expected then
    return {0}
end
if more > 0 and quota >= 0 then
    local total = more + tonumber(redis.call('GET', KEYS[3]) or 0)
    if total > quota then return {-1, total} end
end
if what ~= 'metadata' then
    for i, field in ipairs({'state', 'origin'}) do
        local old = redis.call('HGET', KEYS[1], field)
        if old then redis.call('HSET', KEYS[1], 'before_' .. field, old)
        else redis.call('HDEL', KEYS[1], 'before_' .. field) end
        if string.sub(what, i, i) == '+' then redis.call('HSET', KEYS[1], field, ARGV[6 + i])
        else redis.call('HDEL', KEYS[1], field) end
    end
end
redis.call('HSET', KEYS[1], 'metadata', text)
redis.call('ZADD', KEYS[2], 0, name)
if more ~= 0 then redis.call('INCRBY', KEYS[3], more) end
return {1}
"""
# Where there is no room for more, sessions can be removed and leases taken all the same.
_DELETE = """#!lua flags=allow-oom
local expected, name = ARGV[1], ARGV[2]
local there = redis.call('HGET', KEYS[1], 'metadata')
if expected ~= '' and there ~= expected then return 0 end
local bytes = redis.call('HSTRLEN', KEYS[1], 'state') + redis.call('HSTRLEN', KEYS[1], 'origin')
local n = redis.call('DEL', KEYS[1]) + redis.call('ZREM', KEYS[2], name)
if n == 0 then return 0 end
if bytes > 0 then redis.call('DECRBY', KEYS[3], bytes) end
redis.call('INCR', KEYS[4])
return 1
"""
_LEASE = """#!lua flags=allow-oom
local owner = redis.call('GET', KEYS[1])
if owner and owner ~= ARGV[1] then return redis.call('PTTL', KEYS[1]) end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return -3
"""
_RELEASE = """#!lua flags=allow-oom
if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0
"""
_PAGE = """#!lua flags=no-writes
local page = {}
for i, name in ipairs(redis.call('ZRANGEBYLEX', KEYS[1], ARGV[1], '+', 'LIMIT', 0, ARGV[2])) do
    local key = ARGV[3] .. name
    page[i] = {name, redis.call('HGET', key, 'metadata'), redis.call('HEXISTS', key, 'state'),
        redis.call('HSTRLEN', key, 'state'), redis.call('HEXISTS', key, 'origin'), redis.call('HSTRLEN', key, 'origin')}
end
return page
"""


class ValkeyStore(Rows):
    """`ValkeyStore("valkey://:password@host:6379/0")`; `redis://` and, with TLS, `valkeys://` and `rediss://` too.

    For any number of machines. What is left when the server dies is what its configuration keeps: with `appendonly yes`
    and `appendfsync always` nothing that was acknowledged is lost, with `appendfsync everysec` the last second is, with
    snapshots all since the last, without either everything. A server that may evict sessions to make room is refused.
    Keys begin with `{llamamem}:`, so that one shard of a cluster has them all.
    """

    def __init__(self, url: str, *, quota: int | None = None) -> None:
        try:
            import valkey
        except ImportError:
            raise LlamamemError(
                f"{public_url(url)}: needs the valkey package; pip install 'llamamem[valkey]'"
            ) from None
        self.quota = quota
        self._location = public_url(url)
        self._errors = valkey.exceptions
        scheme, rest = url.split(":", 1)
        from valkey.backoff import NoBackoff
        from valkey.retry import Retry

        try:
            self._client: Any = valkey.Valkey.from_url(
                f"{scheme.replace('redis', 'valkey')}:{rest}",
                socket_timeout=_TIMEOUT,
                socket_connect_timeout=_TIMEOUT,
                # a connection that was ended while nobody used it; every step may be done twice
                retry=Retry(NoBackoff(), 1),
                retry_on_error=[valkey.ConnectionError],
                health_check_interval=30,
            )
        except ValueError as e:
            raise LlamamemError(f"{self._location}: {e}; give valkey://HOST:PORT/NUMBER") from None
        scripts = {"put": _PUT, "delete": _DELETE, "lease": _LEASE, "release": _RELEASE, "page": _PAGE}
        self._scripts: dict[str, Any] = {name: self._client.register_script(text) for name, text in scripts.items()}
        self._checked: list[bool] = []

    @property
    def location(self) -> str:
        return self._location

    def close(self) -> None:
        self._client.close()

    def _get(self, name: str, *, before: bool = False) -> Row | None:
        fields = ["metadata", "state", "origin", *(("before_state", "before_origin") if before else ())]
        with self._reported():
            found = self._client.hmget(self._session(name), fields)
            if found[0] is None:
                if self._client.zscore(self._key("names"), name) is None:
                    return None
                found = self._client.hmget(self._session(name), fields)  # made in between, or thrown away
                if found[0] is None:
                    raise Damaged("it is in the list of names, and its metadata is missing")
        try:
            metadata = found[0].decode()
        except UnicodeDecodeError:
            raise Damaged("its metadata is damaged: it is not text") from None
        return Row(metadata, (found[1], found[2]), (found[3], found[4]) if before else (None, None))

    def _put(self, name: str, expected: str | None, session: Session, memories: Memories | None, more: int) -> bool:
        what = "metadata" if memories is None else "".join("-" if memory is None else "+" for memory in memories)
        quota = -1 if self.quota is None else self.quota
        told = [expected or "", session.model_dump_json(), name, what, more, quota]
        keys = [self._session(name), self._key("names"), self._key("used")]
        with self._reported():
            answer: Any = self._scripts["put"](keys, [*told, *(memory or b"" for memory in memories or ())])
        if answer[0] < 0:
            self._check_quota(answer[1])
        return bool(answer[0])

    def _delete(self, name: str, expected: str | None) -> bool:
        keys = [self._session(name), self._key("names"), self._key("used"), _of_all("removals")]
        with self._reported():
            return bool(self._scripts["delete"](keys, [expected or "", name]))

    def _page(self, after: str, limit: int) -> list[Entry]:
        begin = f"({after}" if after else "-"
        with self._reported():
            page = self._scripts["page"]([self._key("names")], [begin, limit, self._session("")])
        return [
            seen(
                name.decode("utf-8", "replace"), text, n_state if has_state else None, n_origin if has_origin else None
            )
            for name, text, has_state, n_state, has_origin, n_origin in page
        ]

    def _names(self, start: str, limit: int) -> list[str]:
        with self._reported():
            found = self._client.zrangebylex(self._key("names"), f"[{start}" if start else "-", "+", 0, limit)
        names = [name.decode("utf-8", "replace") for name in found]
        return [name for name in names if name.startswith(start)]

    def _total(self) -> int:
        with self._reported():
            return int(self._client.get(self._key("used")) or 0)

    def _take(self, name: str, owner: str, seconds: float) -> float | None:
        with self._reported():
            left = self._scripts["lease"]([self._key("lease", name)], [owner, max(1, round(seconds * 1000))])
        return None if left == -3 else max(0.0, left / 1000)

    def _let_go(self, name: str, owner: str) -> None:
        with self._reported():
            self._scripts["release"]([self._key("lease", name)], [owner])

    def removals(self) -> int:
        with self._reported():
            return int(self._client.get(_of_all("removals")) or 0)

    def _key_texts(self) -> list[str]:
        with self._reported():
            return [text.decode() for text in self._client.hvals(_of_all("keys"))]

    def _add_key_text(self, id: str, text: str) -> bool:
        with self._reported():
            return (
                bool(self._client.hsetnx(_of_all("keys"), id, text))
                or self._client.hget(_of_all("keys"), id) == text.encode()
            )

    def _remove_key_text(self, id: str) -> str | None:
        with self._reported():
            text = self._client.hget(_of_all("keys"), id)
            self._client.hdel(_of_all("keys"), id)
        return None if text is None else text.decode()

    def _session(self, name: str) -> str:
        return self._key("session", name)

    def _key(self, kind: str, *name: str) -> str:
        return ":".join([_of_all(kind), quote(self.namespace, safe=""), *name])

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        errors = self._errors
        try:
            if not self._checked:
                self._check()
                self._checked.append(True)
            yield
        except errors.OutOfMemoryError as e:
            raise Full(f"{self.location}: the server has no memory left for more ({e}); nothing was saved") from None
        except errors.AuthenticationError as e:
            raise LlamamemError(f"{self.location}: {e}; give the user and the password in the URL") from None
        except (errors.ConnectionError, errors.TimeoutError, OSError) as e:
            raise Unreachable(f"{self.location}: the store does not answer ({e}); see to the server") from None
        except errors.ReadOnlyError as e:
            raise Unreachable(f"{self.location}: a replica, which cannot be written ({e}); give the primary") from None
        except errors.ResponseError as e:
            kind: Any = Full if str(e).startswith(("OOM", "MISCONF")) else Unreachable
            raise kind(f"{self.location}: the server refused it ({e})") from None

    def _check(self) -> None:
        """Once: whether it is a server that keeps what it is given, and a store that this version knows."""
        info = self._client.info()
        version = str(info.get("redis_version", "7.0"))
        if int(version.split(".")[0]) < 7:
            raise LlamamemError(f"{self.location}: version {version}; a store needs Redis 7.0 or Valkey 7.2, or later")
        policy = str(info.get("maxmemory_policy", "noeviction"))
        if int(info.get("maxmemory", 0)) and policy.startswith("allkeys"):
            raise LlamamemError(
                f"{self.location}: maxmemory-policy is {policy}, so sessions may be thrown away to make room; set it to"
                " noeviction"
            )
        layout = self._client.get(_of_all("layout"))
        if layout is None:
            with contextlib.suppress(
                self._errors.ResponseError
            ):  # on a replica or a full server the first change says so
                self._client.set(_of_all("layout"), _LAYOUT, nx=True)
        elif layout != _LAYOUT:
            raise LlamamemError(
                f"{self.location}: a store of layout {layout.decode()}, this llamamem reads 1; update it"
            )


def public_url(url: str) -> str:
    """The URL of a store without user, password and options, for messages."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _of_all(kind: str) -> str:
    return f"{{llamamem}}:{kind}"
