"""PyTorch is optional: every other command works without it, and those that need it say so in one line."""

from __future__ import annotations

from importlib.util import find_spec

from llamamem.errors import LlamamemError


def require_torch(what: str, *modules: str) -> None:
    """Raises LlamamemError if torch or transformers, or one of `modules` instead, is missing. `what` needs them."""
    missing = [name for name in modules or ("torch", "transformers") if find_spec(name) is None]
    if missing:
        raise LlamamemError(
            f"{what} needs {' and '.join(missing)}: run `pip install -e '.[reference]'` in llamamem's checkout"
        )
