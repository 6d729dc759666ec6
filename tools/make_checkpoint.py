"""Writes a random adapter checkpoint of a given shape, and a base GGUF of that shape without weights.

    python tools/make_checkpoint.py configs/gemma-4-e4b.json --output e4b --base e4b.gguf
    python tools/make_checkpoint.py configs/qwen3-4b.json --output 4b --base 4b.gguf

The base is all header: the right keys and attention tensors, and a hole in the file where their values would be. It is
for the sidecar's tools alone. The same shape and seed give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from llamamem.errors import LlamamemError
from llamamem.formats.checkpoint import writer as checkpoint_write
from llamamem.formats.gguf_file import GgufTensor
from llamamem.formats.sidecar.layout import DELTA_RULE, RWKV_MS, SOURCE_PREFIX
from llamamem.formats.sidecar.tensor_types import bf16

# A tensor is given by its name, its shape (torch order), the mean and the deviation of its random values.
Spec = tuple[str, tuple[int, ...], float, float]

_HOLE = gguf.GGMLQuantizationType.TQ1_0  # the smallest type: the hole is hashed, after all


@dataclass(frozen=True)
class Memory:
    """Sizes of a memory; `widths` has those of q, k, v and o for each target layer, `base` the name of its base."""

    base: str
    hidden: int
    widths: dict[int, tuple[int, int, int, int]]
    chunk: int  # tokens
    rank: int = 8
    heads: int = 1
    states: int = 4
    alpha: float = 16.0
    lora: int = 32
    delta_heads: tuple[str, ...] = ("q", "o")
    kind: str = RWKV_MS
    prefix: str = SOURCE_PREFIX

    @classmethod
    def of_shape(cls, shape: dict[str, Any]) -> Memory:
        """The memory of a shape file such as configs/gemma-4-e4b.json."""
        memory, base = shape["memory"], shape["base"]
        kind = memory.get("kind", RWKV_MS)
        return cls(
            base=shape["name"],
            hidden=base["hidden"],
            widths={layer: widths(shape, layer) for layer in memory.get("target_layers", range(base["layers"]))},
            chunk=memory.get("rwkv_ms_chunk_size", 0),
            rank=memory["rank"],
            heads=memory["num_state_heads"],
            states=memory.get("rwkv_ms_num_states", 1),
            alpha=memory["alpha"],
            lora=memory.get("lora", 0),
            delta_heads=tuple(memory["delta_heads"]),
            kind=kind,
            prefix=SOURCE_PREFIX if base["architecture"] == "gemma4" else "model.layers.",
        )


def widths(shape: dict[str, Any], layer: int) -> tuple[int, int, int, int]:
    """Of q, k, v and o in a layer of the base."""
    base = shape["base"]
    dim = base["global_head_dim"] if "full_every" in base and full(base, layer) else base["head_dim"]
    return base["heads"] * dim, base["kv_heads"] * dim, base["kv_heads"] * dim, base["hidden"]


def full(base: dict[str, Any], layer: int) -> bool:
    return layer % base["full_every"] == base["full_every"] - 1


def tensor_specs(m: Memory) -> Iterator[Spec]:
    """Every tensor of a checkpoint by its source name, with values in the range of trained ones."""
    d = m.rank * m.heads
    for layer, heads in m.widths.items():
        attn = f"{m.prefix}{layer}.self_attn."
        for name in ("memory_q_proj", "memory_k_proj", "memory_v_proj", "beta_proj"):
            yield f"{attn}{name}", (d, m.hidden), 0.0, 1 / m.hidden**0.5
        yield attn + "beta_bias", (d,), -1.5, 0.6
        for head, width in zip("qkvo", heads, strict=True):
            # delta-mem's checkpoints hold zeros for heads that are not in use
            idle = m.kind == DELTA_RULE and head not in m.delta_heads
            yield f"{attn}delta_{head}_proj", (width, d), 0.0, 0.0 if idle else 0.06
        if m.kind == RWKV_MS:
            yield from core_specs(m, attn + "hrm_rwkv7_core.")


def core_specs(m: Memory, core: str) -> Iterator[Spec]:
    d = m.rank * m.heads
    vectors = {"x_r": (0.4, 0.2), "x_w": (0.3, 0.2), "x_k": (0.6, 0.2), "x_v": (0.7, 0.2), "x_a": (0.6, 0.2)}
    vectors |= {"x_g": (0.6, 0.2), "w0": (-2.7, 1.2), "a0": (-0.3, 0.7), "k_k": (0.6, 0.2), "k_a": (1.0, 0.1)}
    vectors |= {"ln_x.weight": (1.0, 0.2), "ln_x.bias": (0.0, 0.3)}
    for name, (mean, std) in vectors.items():
        yield core + name, (d,), mean, std
    for name in ("w", "a", "g"):
        yield f"{core}{name}1", (d, m.lora), 0.0, 1 / d**0.5
        yield f"{core}{name}2", (m.lora, d), 0.0, 0.27
    for name in ("receptance", "key", "value", "output"):
        yield f"{core}{name}.weight", (d, d), 0.0, 1 / d**0.5


def config(m: Memory, semantics: int) -> dict[str, Any]:
    """What a checkpoint's config must say; every absent key means its implemented value."""
    if m.kind == DELTA_RULE:  # as the published one says, but for what is as by default
        return {
            "rank": m.rank,
            "alpha": m.alpha,
            "beta_bias_init": -1.5,
            "normalize_qk": True,
            "couple_lambda": True,
            "state_update_mode": "standard",
            "rankwise_gates": True,
            "output_init": "base_slice_fixed",
            "num_state_heads": m.heads,
            "memory_write_granularity": "token",
            "target_layers": [],
            "delta_heads": list(m.delta_heads),
        }
    values: dict[str, Any] = {
        "rank": m.rank,
        "alpha": m.alpha,
        "memory_backend": "rwkv_ms",
        "memory_readout_mode": "delta",
        "couple_lambda": True,
        "state_update_mode": "standard",
        "rankwise_gates": True,
        "num_state_heads": m.heads,
        "target_layers": list(m.widths),
        "delta_heads": list(m.delta_heads),
        "rwkv_ms_num_states": m.states,
        "rwkv_ms_chunk_size": m.chunk,
        "rwkv_ms_boundary_mode": "fixed_chunk",
        "rwkv_ms_erase_gate": 1.0,
    }
    return values if semantics == 1 else values | {"rwkv_ms_semantics_version": semantics}


def normal(rng: np.random.Generator, shape: tuple[int, ...], mean: float, std: float) -> np.ndarray:
    """Random F32."""
    return (rng.standard_normal(shape, np.float32) * np.float32(std) + np.float32(mean)).astype(np.float32)


def write_checkpoint(
    folder: Path, m: Memory, seed: int, semantics: int = 1, zero_deltas: bool = False, format: str = "safetensors"
) -> None:
    """A checkpoint directory, as training would leave it: BF16."""
    rng = np.random.default_rng([seed, 1])  # other values than the base's
    tensors = []
    for source, shape, mean, std in tensor_specs(m):
        values = normal(rng, shape, mean, std)
        if zero_deltas and ".delta_" in source:
            values = np.zeros_like(values)
        tensors.append(GgufTensor(source, "BF16", shape, bf16(values)))
    about = None if m.kind == DELTA_RULE else {"base_model": m.base}
    checkpoint_write.write_checkpoint(folder, tensors, config(m, semantics), about, format=format)


def write_hollow_base(path: Path, shape: dict[str, Any]) -> None:
    """A base GGUF of the shape whose tensors are those of attention, all zeros, and a hole in the file."""
    base = shape["base"]
    writer = gguf.GGUFWriter(path, base["architecture"])
    writer.add_name(shape["name"])
    writer.add_block_count(base["layers"])
    writer.add_embedding_length(base["hidden"])
    writer.add_head_count(base["heads"])
    writer.add_head_count_kv(base["kv_heads"])
    writer.add_key_length(base.get("global_head_dim", base["head_dim"]))
    writer.add_value_length(base.get("global_head_dim", base["head_dim"]))
    if "full_every" in base:
        writer.add_key_length_swa(base["head_dim"])
        writer.add_value_length_swa(base["head_dim"])
        writer.add_sliding_window_pattern([not full(base, layer) for layer in range(base["layers"])])
    block, block_bytes = gguf.GGML_QUANT_SIZES[_HOLE]
    n_bytes = 0
    for layer in range(base["layers"]):
        q, k, v, o = widths(shape, layer)
        for name, matrix in (("q", (q, o)), ("k", (k, o)), ("v", (v, o)), ("output", (o, q))):
            size = prod(matrix) // block * block_bytes
            writer.add_tensor_info(f"blk.{layer}.attn_{name}.weight", matrix, np.dtype(np.float32), size, _HOLE)
            n_bytes += -(-size // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    header = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(-(-header // 32) * 32 + n_bytes)


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes a random adapter checkpoint of a given shape.")
    parser.add_argument("shape", type=Path, help="shape as JSON, such as configs/gemma-4-e4b.json")
    parser.add_argument("--output", type=Path, required=True, help="checkpoint directory to write; empty or new")
    parser.add_argument("--format", choices=checkpoint_write.FORMATS, default="pt")
    parser.add_argument("--base", type=Path, help="base GGUF without weights to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--semantics", type=int, choices=(1, 2), default=1)
    args = parser.parse_args()
    shape = json.loads(args.shape.read_text())
    write_checkpoint(args.output, Memory.of_shape(shape), args.seed, args.semantics, format=args.format)
    if args.base is not None:
        write_hollow_base(args.base, shape)


if __name__ == "__main__":
    try:
        main()
    except (LlamamemError, OSError) as e:
        print(f"make_checkpoint: error: {e}", file=sys.stderr)
        sys.exit(2)
