"""`llamamem scale`: replicas of a server and its gateway behind one URL, on Ray Serve."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from llamamem.cli.base import base_file
from llamamem.cli.session import PLACES, Quota, open_given_store, size_of
from llamamem.errors import LlamamemError
from llamamem.serving.foreground import STOPPED, Signals

_APPLICATION = "llamamem"
# On a busy machine Ray's own processes take longer to start than it waits for them.
_PATIENCE = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # they are what this machine is for
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
}


def register(app: typer.Typer) -> None:
    # what follows `--` is left in context.args
    app.command("scale", context_settings={"allow_extra_args": True})(scale)


def scale(
    context: typer.Context,
    store: Annotated[
        str,
        typer.Option(metavar=PLACES, envvar="LLAMAMEM_SESSIONS", help="Where all replicas keep sessions."),
    ],
    replicas: Annotated[int, typer.Option(min=1, help="How many; each has a llama-server and a gateway.")] = 2,
    model: Annotated[
        Path | None, typer.Option(help="Base GGUF, or a name that `llamamem pull` knows.", callback=base_file)
    ] = None,
    sidecar: Annotated[Path | None, typer.Option(help="Sidecar GGUF.")] = None,
    demo: Annotated[bool, typer.Option("--demo", help="The small model of `llamamem demo`, with its memory.")] = False,
    profile: Annotated[str, typer.Option(help="As of `llamamem serve`.")] = "batched",
    parallel: Annotated[int | None, typer.Option(help="Slots of each replica; 4 unless given.")] = None,
    ctx_size: Annotated[int | None, typer.Option(help="Tokens of context; 0: the model's own.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, help="Port to listen on.")] = 8000,
    bin_dir: Annotated[Path | None, typer.Option(help="Directory of a build made elsewhere.")] = None,
    quota: Quota = None,
    session_header: Annotated[
        str | None, typer.Option(metavar="NAME", help="The header that requests are routed by; also names a session.")
    ] = None,
    lease: Annotated[
        float, typer.Option(min=1, help="Seconds that a replica which died keeps a session from the others.")
    ] = 10.0,
    address: Annotated[
        str | None, typer.Option(help="A Ray cluster that runs; else one is started here, and ended.")
    ] = None,
) -> None:
    """Serve a base with its memory by replicas behind one URL, until Ctrl-C. What follows -- goes to llama-server.

    Requests with the header X-Session-Id go to one replica a session, by Ray's consistent-hash router; that one dead,
    others go on with the session from the store. configs/ray-serve.yaml is the same for a cluster, with autoscaling.

    Exit status: 0 stopped on request, 2 it could not start.
    """
    for name, value in _PATIENCE.items():
        os.environ.setdefault(name, value)
    if session_header is not None:
        os.environ["RAY_SERVE_SESSION_ID_HEADER_KEY"] = session_header.lower()
    try:
        import ray
        from ray import serve
    except ImportError:
        raise LlamamemError("Ray is missing; pip install 'llamamem[scale]'") from None
    from llamamem.gateway.access import is_loopback
    from llamamem.scale.app import MEMORY
    from llamamem.scale.replica import STORE, Options

    told: dict[str, Any] = {
        "model": model and str(model.absolute()),
        "sidecar": sidecar and str(sidecar.absolute()),
        "demo": demo,
        "quota": None if quota is None else size_of(quota, "--quota"),
        "profile": profile,
        "parallel": parallel,
        "ctx_size": ctx_size,
        "bin_dir": bin_dir and str(bin_dir.absolute()),
        "lease": lease,
        "session_header": session_header,
        "needs_key": not is_loopback(host),
        "arguments": context.args,
    }
    os.environ[STORE] = store  # not among what Ray shows: it may have a password in it
    Options.of(told)
    opened = open_given_store(store)
    if not is_loopback(host) and not opened.keys():
        raise LlamamemError(
            f"--host {host}: whoever reaches this machine could read every memory; make a key first, with"
            " `llamamem key add`"
        )
    opened.removals()
    opened.close()
    with Signals() as signals:
        started: dict[str, Any] = {"num_cpus": replicas, "include_dashboard": False} if address is None else {}

        def deploy() -> None:
            serve.start(http_options={"host": host, "port": port})
            serve.run(MEMORY.options(num_replicas=replicas).bind(told), name=_APPLICATION, route_prefix="/")

        try:
            # here, not beside: the kernel ties Ray's processes to the thread that made them
            ray.init(address=address or "local", log_to_driver=False, logging_level="ERROR", **started)
            _run(signals, deploy)
            if not signals.received:
                print(
                    f"llamamem: ready at http://{host}:{port} ({replicas} replicas, sessions in {opened.location})",
                    file=sys.stderr,
                    flush=True,
                )
            while not signals.received:
                time.sleep(0.1)
        except (OSError, RuntimeError, ray.exceptions.RayError) as e:
            raise LlamamemError(f"Ray does not start: {str(e).splitlines()[0]}") from None
        finally:
            if ray.is_initialized():
                serve.delete(_APPLICATION) if address else serve.shutdown()
                ray.shutdown()
    raise typer.Exit(STOPPED)


def _run(signals: Signals, deploy: Callable[[], object]) -> None:
    """Until the replicas are ready. Raises LlamamemError when they do not become so."""
    fault: list[Exception] = []

    def run() -> None:
        try:
            deploy()
        except Exception as e:
            fault.append(e)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive() and not signals.received:
        thread.join(0.1)
    if fault:
        raise LlamamemError(f"the replicas did not start: {_why(fault[0])}; the logs of Ray are in /tmp/ray") from None


def _why(fault: Exception) -> str:
    """What a replica said, if one did, and not the traceback around it."""
    from ray import serve

    with contextlib.suppress(Exception):
        for application in serve.status().applications.values():
            for deployment in application.deployments.values():
                if found := re.findall(r"LlamamemError: (.+)", deployment.message):
                    return str(found[-1])
    return str(fault).splitlines()[0]
