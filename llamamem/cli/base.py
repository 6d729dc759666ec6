"""What --model and --base take: a path, or a name of the catalogue."""

from __future__ import annotations

from pathlib import Path

import typer

from llamamem.native.catalogue import CATALOGUE, base_path

NAMES = ", ".join(CATALOGUE)


def base_file(context: typer.Context, given: Path | None) -> Path | None:
    """The callback of every such option. Raises LlamamemError for a name that was not pulled."""
    # a shell that completes a command line runs none
    return given if given is None or context.resilient_parsing else base_path(given)


def base_name(context: typer.Context, given: str) -> str:
    """The same where a repository of a hub may stand too."""
    return given if context.resilient_parsing else str(base_path(Path(given))) if given in CATALOGUE else given
