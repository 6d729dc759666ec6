"""What a replica has: one llama-server, and the gateway in front of it, which ends when the server does."""

from __future__ import annotations

import os
import secrets
import threading
import time
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from llamamem.errors import LlamamemError
from llamamem.formats.demo_files import demo_files
from llamamem.gateway import Gateway, Settings, Upstream
from llamamem.gateway.naming import CONVERSATION_HEADERS, SESSION_HEADERS, Headers
from llamamem.native.build import find_build
from llamamem.serving.client import Client
from llamamem.serving.preflight import check
from llamamem.serving.probe import probe
from llamamem.serving.process import Server, launch
from llamamem.serving.profiles import PAGE, make_plan
from llamamem.sessions import open_store

STORE = "LLAMAMEM_SESSIONS"  # of the environment: the place of the store, which may have a password in it

_GRACE = 10.0  # seconds that a server has to end
_ANSWERS = 1.0  # seconds for the last answers of a gateway whose server ended


class Options(BaseModel):
    """What replicas are told: `args` of the application in the YAML, the options of `llamamem serve`.

    `sessions` is the store, the same for all; without it the environment's LLAMAMEM_SESSIONS, which Ray does not show.
    """

    model_config = ConfigDict(extra="forbid")

    model: Path | None = None
    sidecar: Path | None = None
    demo: bool = False
    sessions: str | None = None
    quota: int | None = None  # bytes
    profile: str = "batched"
    parallel: int | None = None
    ctx_size: int | None = None
    bin_dir: Path | None = None
    lease: float = 10.0  # seconds that a replica which died keeps a session from the others
    max_body: int = 32 << 20  # bytes
    session_header: str | None = None  # that names a session, beside those of the docs
    needs_key: bool = False  # also while the store has no keys
    memory_check: bool = True
    arguments: list[str] = []  # to llama-server

    @classmethod
    def of(cls, told: dict[str, object]) -> Options:
        try:
            options = cls.model_validate(told)
        except ValidationError as e:
            fault = e.errors()[0]
            raise LlamamemError(f"args: {'.'.join(map(str, fault['loc']))}: {fault['msg']}") from None
        if options.demo:
            files = demo_files()
            options = options.model_copy(update={"model": files.model, "sidecar": files.sidecar, "demo": False})
        if options.model is None or options.sidecar is None:
            raise LlamamemError("args: model and sidecar are missing; give both, or demo: true for the small model")
        return options

    @property
    def store(self) -> str:
        place = self.sessions or os.environ.get(STORE)
        if place is None:
            raise LlamamemError(f"args: sessions is missing; give the store of all replicas there, or in {STORE}")
        return place


class Replica:
    """`with Replica(options) as replica:` serves `replica.gateway`, an ASGI application, until the block ends.

    The kernel ends the server when the process ends, however it does. `ended` is called in a thread when the server
    ended by itself. Raises LlamamemError when it does not start.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self._key = secrets.token_urlsafe(24)  # nobody but the gateway talks to the server
        self._stop = threading.Event()
        self._ready = threading.Event()
        self._fault: LlamamemError | None = None
        self._server: Server | None = None
        store = open_store(options.store, quota=options.quota)
        named = () if options.session_header is None else (options.session_header.lower(),)
        headers = Headers((*named, *SESSION_HEADERS), CONVERSATION_HEADERS)
        settings = Settings(
            headers=headers, needs_key=options.needs_key, lease=options.lease, max_body=options.max_body
        )
        self.gateway = Gateway(store, Upstream("", self._key), settings)
        # the kernel ties a child to the thread that made it, which must live as long as it
        self._thread = threading.Thread(target=self._own, name="llama-server", daemon=True)

    def __enter__(self) -> Replica:
        self._thread.start()
        self._ready.wait()
        if self._fault is not None:
            raise self._fault
        return self

    def __exit__(self, *_: object) -> None:
        self.gateway.draining = True
        self._stop.set()
        self._thread.join(_GRACE + 5)

    def check(self) -> None:
        """What `llamamem health --probe` looks at. Raises LlamamemError."""
        if self._server is None or self._stop.is_set():
            raise LlamamemError("the replica's llama-server ended")
        with Client(self._server.url, api_key=self._key, timeout=5.0) as client:
            report = probe(client, self._server.record)
        if not report.ok:
            raise LlamamemError(f"{report.url}: {report.detail}")

    def ended(self) -> None:
        """A replica without its server is none: its process ends, and whoever runs it starts another."""
        self.gateway.draining = True
        time.sleep(_ANSWERS)
        os._exit(1)

    def _own(self) -> None:
        try:
            with self._started() as server:
                server.wait_ready(api_key=self._key)
                self._server = server
                self.gateway.upstream.moved(server.url)
                self._ready.set()
                while not self._stop.wait(0.05) and server.process.poll() is None:
                    pass
                if not self._stop.is_set():
                    print(f"llamamem: the server ended by itself: it {server.how_it_ended}; log: {server.log_path}")
                    self.ended()
        except LlamamemError as e:
            self._fault = e
        finally:
            self._ready.set()

    def _started(self) -> Server:
        options = self.options
        assert options.model is not None and options.sidecar is not None
        build = find_build(bin_dir=options.bin_dir)
        plan = make_plan(
            options.model.absolute(),
            bin_dir=build.bin_dir,
            sidecar=options.sidecar.absolute(),
            profile=options.profile,
            parallel=options.parallel,
            ctx_size=options.ctx_size,
            port=0,
            page=PAGE,
            extra=options.arguments,
        )
        checked = check(plan, memory_check=options.memory_check, on_cpu=build.backend == "cpu")
        return launch(plan, checked, build=build.identity, hidden={"LLAMA_API_KEY": self._key})
