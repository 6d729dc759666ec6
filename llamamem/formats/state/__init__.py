"""A saved state: what it is, reading, checking and writing one. docs/state-format.md has it by byte."""

from llamamem.formats.state.block import CHECKPOINT, CONTEXT, KINDS, MADE_BY_TOOL, MEMORY, SEQUENCE, STATE_REASONS
from llamamem.formats.state.file import (
    Identity,
    Setting,
    State,
    decode_state,
    encode_state,
    identity_of,
    origin_sha256,
    read_state,
    write_state,
)

__all__ = [
    "CHECKPOINT",
    "CONTEXT",
    "KINDS",
    "MADE_BY_TOOL",
    "MEMORY",
    "SEQUENCE",
    "STATE_REASONS",
    "Identity",
    "Setting",
    "State",
    "decode_state",
    "encode_state",
    "identity_of",
    "origin_sha256",
    "read_state",
    "write_state",
]
