"""Sessions by name for any client, in front of a llama-server: what `llamamem serve --sessions` runs."""

from __future__ import annotations

from llamamem.gateway.app import Gateway, Settings
from llamamem.gateway.run import Running, listen
from llamamem.gateway.upstream import Upstream

__all__ = ["Gateway", "Running", "Settings", "Upstream", "listen"]
