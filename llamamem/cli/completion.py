"""What a shell offers after Tab: names of runs, of sessions, of profiles. A fault offers nothing and says nothing."""

from __future__ import annotations

import typer

_MOST = 200  # names of sessions: nobody reads more


def run_names(incomplete: str) -> list[str]:
    from llamamem.serving.runs import live_runs

    return [name for name in (record.name for record in live_runs()) if name.startswith(incomplete)]


def session_names(context: typer.Context, incomplete: str) -> list[str]:
    from llamamem.cli.session import open_given_store
    from llamamem.errors import LlamamemError

    try:
        return open_given_store(context.params.get("store")).names(incomplete, _MOST)
    except LlamamemError:
        return []


def profile_names(incomplete: str) -> list[str]:
    from llamamem.serving.profiles import PROFILES

    return [name for name in PROFILES if name.startswith(incomplete)]
