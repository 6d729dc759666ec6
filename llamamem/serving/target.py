"""Which server a command talks to: a recorded run, or a URL."""

from __future__ import annotations

from llamamem.errors import LlamamemError
from llamamem.formats.run import RunRecord
from llamamem.serving.client import Client
from llamamem.serving.runs import find_run, live_runs


def open_target(
    run: str | None, url: str | None, api_key: str | None, *, timeout: float = 600.0
) -> tuple[Client, RunRecord | None]:
    """A client, and the server's record where it has one. `api_key` may be a list with commas, as the server's is."""
    key = first_key(api_key)
    if url is None:
        found = find_run(run)
        return Client(found.gateway or found.url, api_key=key, timeout=timeout), found
    if run is not None:
        raise LlamamemError("--run and --url both name a server; give one of them")
    url = server_url(url)
    return Client(url, api_key=key, timeout=timeout), next(
        (record for record in live_runs() if url in (record.gateway, record.url)), None
    )


def server_url(url: str) -> str:
    """Without the `/v1` that OpenAI's clients are given. Raises LlamamemError for what is no URL of a server."""
    plain = url.rstrip("/").removesuffix("/v1").rstrip("/")
    if not plain.startswith(("http://", "https://")):
        raise LlamamemError(f"--url {url}: no URL of a server; give one such as http://127.0.0.1:8080")
    return plain


def first_key(api_key: str | None) -> str | None:
    """The one that is sent, of a list with commas. Raises LlamamemError for one that no header can carry."""
    key = api_key.split(",")[0] if api_key else None
    if key is not None and not (key.isascii() and key.isprintable()):
        raise LlamamemError("--api-key: has characters that a request cannot carry; give one of printable ASCII")
    return key
