"""A light look at a running server, for container health checks and load balancers: it touches no slot."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import httpx

from llamamem.errors import LlamamemError
from llamamem.formats.run import RunRecord
from llamamem.serving.client import Client

__all__ = ["ProbeReport", "probe"]


@dataclass(frozen=True)
class ProbeReport:
    """`detail` says what answers, or what is missing; `url` is None when no server runs."""

    ok: bool
    url: str | None
    detail: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def probe(client: Client, record: RunRecord | None) -> ProbeReport:
    """Whether the server is ready and has the memory that its run was started with.

    Without a record of the run any memory is as good as none. Behind an API key that we were not given, only
    that it is ready can be seen. Nothing is raised for a server that is down: that is an answer.
    """
    url = str(client.url)
    try:
        ready = client.request("GET", "/health")
        if ready.status_code != 200:
            why = "is loading its model" if ready.status_code == 503 else f"answers {ready.status_code} to /health"
            return ProbeReport(False, url, f"the server {why}")
        answer = client.request("GET", "/props")
        if answer.status_code in (401, 403):
            return ProbeReport(True, url, "ready; give --api-key to have its memory looked at too")
        fault, found = _memory(answer, record)
    except LlamamemError as e:
        return ProbeReport(False, url, str(e).removeprefix(f"{url}: "))
    return ProbeReport(fault is None, url, fault or found)


def _memory(answer: httpx.Response, record: RunRecord | None) -> tuple[str | None, str]:
    try:
        props = answer.json() if answer.status_code == 200 else {}
    except ValueError:
        props = {}
    if not isinstance(props, dict) or not props:
        return f"the server answers {answer.status_code} to /props, without an object", ""
    memory = props.get("rwkv_ms")
    if memory is not None and not isinstance(memory, dict):
        return "the server's memory is no object: it is not llamamem's build", ""
    if record is None or record.sidecar is None:
        found = f"memory {memory.get('mode')}" if memory else "no memory"
        return None, f"ready, {found}"
    if memory is None:
        return f"the server has no memory, the run {record.name} was started with {record.sidecar}", ""
    if record.sidecar_sha256 not in (None, memory.get("sidecar_sha256")):
        return f"the server's memory is of another sidecar than {record.sidecar}", ""
    return None, f"ready, memory {memory.get('mode')}"
