"""Sessions in PostgreSQL 13 or later: a row each, a transaction a change."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from llamamem.errors import LlamamemError
from llamamem.sessions.rows import Memories, Row, Rows, seen
from llamamem.sessions.session import Entry, Session
from llamamem.sessions.store import Full, Unreachable
from llamamem.sessions.valkey import public_url

_MOST = 8  # connections of a store, of all its namespaces: a server has a hundred unless told otherwise
_LOCK = 0x524D5653  # of the advisory lock that one migration at a time holds

# By version; what is released is never edited, a change is one more. "C" is the order of code points.
_MIGRATIONS = (
    """
    CREATE TABLE llamamem_session (
        namespace text COLLATE "C" NOT NULL, name text COLLATE "C" NOT NULL, metadata text NOT NULL,
        state bytea, origin bytea, before bytea, before_origin bytea, PRIMARY KEY (namespace, name));
    ALTER TABLE llamamem_session ALTER state SET STORAGE EXTERNAL, ALTER origin SET STORAGE EXTERNAL,
        ALTER before SET STORAGE EXTERNAL, ALTER before_origin SET STORAGE EXTERNAL;
    CREATE TABLE llamamem_used (namespace text COLLATE "C" PRIMARY KEY, bytes bigint NOT NULL);
    CREATE TABLE llamamem_key (id text PRIMARY KEY, text text NOT NULL);
    CREATE TABLE llamamem_removals (n bigint NOT NULL);
    INSERT INTO llamamem_removals VALUES (0);
    CREATE UNLOGGED TABLE llamamem_lease (
        namespace text COLLATE "C", name text COLLATE "C", owner text NOT NULL, until timestamptz NOT NULL,
        PRIMARY KEY (namespace, name));
    """,
)
_OF = "WHERE namespace = %s AND name = %s"
_LEASE = """
INSERT INTO llamamem_lease AS lease VALUES (%s, %s, %s, clock_timestamp() + make_interval(secs => %s))
ON CONFLICT (namespace, name) DO UPDATE SET owner = excluded.owner, until = excluded.until
WHERE lease.owner = excluded.owner OR lease.until <= clock_timestamp() RETURNING true
"""

_T = TypeVar("_T")


class PostgresStore(Rows):
    """`PostgresStore("postgresql://user:password@host/database")`; its tables begin with `llamamem_` and are made, and
    brought on to this version, by the first use.

    For any number of machines. Nothing that was acknowledged is lost when the server dies, unless it was told to trade
    that for speed (`fsync` or `synchronous_commit` off: then up to the last second). Leases do not survive it. What is
    removed is gone from every query at once; the server's own files have it until they are vacuumed and its log is
    recycled, and so have backups.
    """

    def __init__(self, url: str, *, quota: int | None = None) -> None:
        try:
            import psycopg
        except ImportError:
            raise LlamamemError(
                f"{public_url(url)}: needs the psycopg package; pip install 'llamamem[postgres]'"
            ) from None
        self.quota = quota
        self._url = url
        self._location = public_url(url)
        self._psycopg = psycopg
        self._free: list[Any] = []  # connections that nobody uses, the one last used last
        self._room = threading.Semaphore(_MOST)
        self._checked: list[bool] = []

    @property
    def location(self) -> str:
        return self._location

    def close(self) -> None:
        while self._free:
            self._free.pop().close()

    def _get(self, name: str, *, before: bool = False) -> Row | None:
        columns = "metadata, state, origin" + (", before, before_origin" if before else "")
        query = f"SELECT {columns} FROM llamamem_session {_OF}"
        row = self._do(lambda db: db.execute(query, self._of(name), binary=True).fetchone())
        if row is None:
            return None
        return Row(row[0], (row[1], row[2]), (row[3], row[4]) if before else (None, None))

    def _put(self, name: str, expected: str | None, session: Session, memories: Memories | None, more: int) -> bool:
        text = session.model_dump_json()

        def put(db: Any) -> bool:
            if expected is None:
                row = (*self._of(name), text, *(memories or (None, None)))
                query = "INSERT INTO llamamem_session VALUES (%s, %s, %s, %b, %b) ON CONFLICT DO NOTHING"
                done = db.execute(query, row).rowcount
            elif memories is None:
                query = f"UPDATE llamamem_session SET metadata = %s {_OF} AND metadata = %s"
                done = db.execute(query, (text, *self._of(name), expected)).rowcount
            else:
                query = (
                    "UPDATE llamamem_session SET metadata = %s, before = state, before_origin = origin, state = %b,"
                    f" origin = %b {_OF} AND metadata = %s"
                )
                done = db.execute(query, (text, *memories, *self._of(name), expected)).rowcount
            if not done:
                found = db.execute(f"SELECT metadata FROM llamamem_session {_OF}", self._of(name)).fetchone()
                return found == (text,)
            if more:
                self._count(db, more)
            return True

        return self._do(put, whole=True)

    def _delete(self, name: str, expected: str | None) -> bool:
        query = f"DELETE FROM llamamem_session {_OF} AND (%s::text IS NULL OR metadata = %s) RETURNING"

        def delete(db: Any) -> bool:
            lengths = "coalesce(octet_length(state), 0) + coalesce(octet_length(origin), 0)"
            found = db.execute(f"{query} {lengths}", (*self._of(name), expected, expected)).fetchone()
            if found is None:
                return False
            if found[0]:
                self._count(db, -found[0])
            db.execute("UPDATE llamamem_removals SET n = n + 1")
            db.execute("DELETE FROM llamamem_lease WHERE until < clock_timestamp()")
            return True

        return self._do(delete, whole=True)

    def _page(self, after: str, limit: int) -> list[Entry]:
        query = (
            "SELECT name, metadata, octet_length(state), octet_length(origin) FROM llamamem_session"
            " WHERE namespace = %s AND name > %s ORDER BY name LIMIT %s"
        )
        return [seen(*row) for row in self._do(lambda db: db.execute(query, (self.namespace, after, limit)).fetchall())]

    def _names(self, start: str, limit: int) -> list[str]:
        query = "SELECT name FROM llamamem_session WHERE namespace = %s AND name >= %s ORDER BY name LIMIT %s"
        found = self._do(lambda db: db.execute(query, (self.namespace, start, limit)).fetchall())
        return [name for (name,) in found if name.startswith(start)]

    def _total(self) -> int:
        query = "SELECT coalesce(sum(bytes), 0) FROM llamamem_used WHERE namespace = %s"
        return int(self._do(lambda db: db.execute(query, (self.namespace,)).fetchone())[0])

    def _take(self, name: str, owner: str, seconds: float) -> float | None:
        left = f"SELECT extract(epoch FROM until - clock_timestamp()) FROM llamamem_lease {_OF}"

        def take(db: Any) -> float | None:
            for _ in range(3):  # the other one may end between the two questions
                if db.execute(_LEASE, (*self._of(name), owner, seconds)).fetchone():
                    return None
                if row := db.execute(left, self._of(name)).fetchone():
                    return max(0.0, float(row[0]))
            return 0.0

        return self._do(take)

    def _let_go(self, name: str, owner: str) -> None:
        query = f"DELETE FROM llamamem_lease {_OF} AND owner = %s"
        self._do(lambda db: db.execute(query, (*self._of(name), owner)))

    def removals(self) -> int:
        return int(self._do(lambda db: db.execute("SELECT n FROM llamamem_removals").fetchone())[0])

    def _key_texts(self) -> list[str]:
        return [text for (text,) in self._do(lambda db: db.execute("SELECT text FROM llamamem_key").fetchall())]

    def _add_key_text(self, id: str, text: str) -> bool:
        def add(db: Any) -> bool:
            db.execute("INSERT INTO llamamem_key VALUES (%s, %s) ON CONFLICT DO NOTHING", (id, text))
            found = db.execute("SELECT text FROM llamamem_key WHERE id = %s", (id,)).fetchone()
            return found == (text,)

        return self._do(add, whole=True)

    def _remove_key_text(self, id: str) -> str | None:
        query = "DELETE FROM llamamem_key WHERE id = %s RETURNING text"
        row = self._do(lambda db: db.execute(query, (id,)).fetchone())
        return None if row is None else str(row[0])

    def _of(self, name: str) -> tuple[str, str]:
        return self.namespace, name

    def _count(self, db: Any, more: int) -> None:
        query = (
            "INSERT INTO llamamem_used AS used VALUES (%s, %s)"
            " ON CONFLICT (namespace) DO UPDATE SET bytes = used.bytes + excluded.bytes RETURNING bytes"
        )
        total = db.execute(query, (self.namespace, more)).fetchone()[0]
        if more > 0:
            self._check_quota(total)

    def _do(self, step: Callable[[Any], _T], *, whole: bool = False) -> _T:
        """Does the step, in a transaction if it changes more than one row. An old connection may have ended: then it is
        done once more on a new one, and perhaps twice."""
        with self._reported(), self._room:
            while True:
                fresh = not self._free
                db = self._connect() if fresh else self._free.pop()
                try:
                    with db.transaction() if whole else contextlib.nullcontext():
                        done = step(db)
                except self._psycopg.OperationalError:
                    if fresh or not db.closed:
                        raise
                    self.close()  # the others ended with it
                    continue
                finally:
                    if not db.closed:
                        self._free.append(db)
                return done

    def _connect(self) -> Any:
        db = self._psycopg.connect(self._url, autocommit=True, connect_timeout=10, prepare_threshold=2)
        try:
            if not self._checked:
                self._check(db)
                self._checked.append(True)
        except BaseException:
            db.close()
            raise
        return db

    def _check(self, db: Any) -> None:
        if db.info.server_version < 130000 or db.execute("SHOW server_encoding").fetchone()[0] != "UTF8":
            raise LlamamemError(f"{self.location}: a store needs PostgreSQL 13 or later, and a database in UTF8")
        if db.execute("SELECT to_regclass('llamamem_version') IS NOT NULL").fetchone()[0]:
            if _version(db) == len(_MIGRATIONS):
                return
        with db.transaction():
            db.execute("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))
            db.execute("CREATE TABLE IF NOT EXISTS llamamem_version (version int NOT NULL)")
            version = _version(db)
            if version > len(_MIGRATIONS):
                raise LlamamemError(
                    f"{self.location}: a store of version {version}, this llamamem reads {len(_MIGRATIONS)}; update it"
                )
            for migration in _MIGRATIONS[version:]:
                db.execute(migration)
            db.execute("DELETE FROM llamamem_version")
            db.execute("INSERT INTO llamamem_version VALUES (%s)", (len(_MIGRATIONS),))

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        errors = self._psycopg.errors
        try:
            yield
        except (errors.DiskFull, errors.OutOfMemory) as e:
            raise Full(f"{self.location}: the server has no room for more ({_line(e)}); nothing was saved") from None
        except (errors.InvalidPassword, errors.InvalidAuthorizationSpecification, errors.InsufficientPrivilege) as e:
            raise LlamamemError(f"{self.location}: {_line(e)}; see to the user, the password and its rights") from None
        except (self._psycopg.OperationalError, self._psycopg.InterfaceError) as e:
            raise Unreachable(f"{self.location}: the store does not answer ({_line(e)}); see to the server") from None
        except self._psycopg.Error as e:
            raise Unreachable(f"{self.location}: the server refused it ({_line(e)})") from None


def _version(db: Any) -> int:
    return int(db.execute("SELECT coalesce(max(version), 0) FROM llamamem_version").fetchone()[0])


def _line(error: Exception) -> str:
    return str(error).split("\n")[0]
