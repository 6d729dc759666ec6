"""Which server a command talks to: a recorded run, or a URL."""

from __future__ import annotations

from llamamem.errors import LlamamemError
from llamamem.formats.run import RunRecord
from llamamem.serving.client import Client
from llamamem.serving.runs import find_run, live_runs


def open_target(run: str | None, url: str | None, api_key: str | None) -> tuple[Client, RunRecord | None]:
    """A client, and the server's record where it has one. `api_key` may be a list with commas, as the server's is."""
    key = api_key.split(",")[0] if api_key else None
    if url is None:
        found = find_run(run)
        return Client(found.url, api_key=key), found
    if run is not None:
        raise LlamamemError("--run and --url both name a server; give one of them")
    url = url.rstrip("/")
    return Client(url, api_key=key), next((record for record in live_runs() if record.url == url), None)
