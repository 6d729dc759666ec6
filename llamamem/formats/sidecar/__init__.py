"""The sidecar GGUF: what it is, reading and checking one. docs/sidecar.md is what it must be.

export.py writes one from a checkpoint, copy.py from another one.
"""

from llamamem.formats.findings import REASONS, Finding
from llamamem.formats.sidecar.layout import (
    ARCHITECTURE,
    ARCHITECTURES,
    DELTA_CHUNK,
    DELTA_RULE,
    HEADS,
    MEMORY_KINDS,
    NAME_FORMAT,
    PREFIX,
    RWKV_MS,
    SCHEMA,
    TYPES,
    Sidecar,
    manifest_entry,
    short_name,
    values,
)
from llamamem.formats.sidecar.reader import Validation, check_sidecar, read_sidecar, validate_sidecar

__all__ = [
    "ARCHITECTURE",
    "ARCHITECTURES",
    "DELTA_CHUNK",
    "DELTA_RULE",
    "HEADS",
    "MEMORY_KINDS",
    "NAME_FORMAT",
    "PREFIX",
    "REASONS",
    "RWKV_MS",
    "SCHEMA",
    "TYPES",
    "Finding",
    "Sidecar",
    "Validation",
    "check_sidecar",
    "manifest_entry",
    "read_sidecar",
    "short_name",
    "validate_sidecar",
    "values",
]
