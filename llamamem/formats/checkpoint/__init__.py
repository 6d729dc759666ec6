"""The checkpoint that an adapter comes in: reading one. writer.py writes one, from a sidecar too."""

from llamamem.formats.checkpoint.reader import (
    ADAPTER,
    CONFIG,
    METADATA,
    Checkpoint,
    read_checkpoint,
    read_safetensors,
    read_torch_zip,
)

__all__ = ["ADAPTER", "CONFIG", "METADATA", "Checkpoint", "read_checkpoint", "read_safetensors", "read_torch_zip"]
