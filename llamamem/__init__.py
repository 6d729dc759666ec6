"""Gemma 4 with an RWKV-MS memory beside it, inside a pinned and patched llama.cpp."""

from __future__ import annotations

# Imported while CMake configures, before any dependency is installed: standard library only.
__version__ = "0.1.0"
