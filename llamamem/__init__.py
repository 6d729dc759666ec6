"""Language models that remember: a memory beside an unchanged model, inside a pinned and patched llama.cpp."""

from __future__ import annotations

# Imported while CMake configures, before any dependency is installed: standard library only.
__version__ = "0.1.0"
