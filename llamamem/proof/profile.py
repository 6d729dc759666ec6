"""What of a token's time is the memory's op: every node of the graph is computed alone and timed.

Alone, a node pays for being waited for, which on a GPU is more than a small kernel takes, and nothing is fused. So the
op's time is an upper bound, the whole is longer than it would be, and the share is of this whole.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llamamem.native.runtime import Context, Model

_OP = "adapter_mem_core"
_DELTA = "adapter_mem_delta"


@dataclass(frozen=True)
class Phase:
    """Seconds for `n_tokens` tokens of all `n_layers` memories: of the op, the deltas, and every node."""

    n_tokens: int
    n_layers: int
    op: float
    deltas: float
    nodes: float

    @property
    def us_per_token_layer(self) -> float:
        """Microseconds of the op for one token in one layer."""
        return self.op / self.n_tokens / self.n_layers * 1e6

    @property
    def share(self) -> float:
        """The op's part of the time of all nodes."""
        return self.op / self.nodes

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**vars(self), "op_us_per_token_layer": self.us_per_token_layer, "op_share": self.share}


@dataclass(frozen=True)
class Profile:
    """Medians over the repeats, of the prompt and of one token at a time; `devices` hold the states."""

    prefill: Phase
    decode: Phase
    devices: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "prefill": self.prefill.to_dict(),
            "decode": self.decode.to_dict(),
            "devices": list(self.devices),
        }


class _Clock:
    """Seconds by kind of node since it was last read."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys((_OP, _DELTA, ""), 0.0)
        self._start = 0.0

    def __call__(self, name: str, before: bool) -> None:
        now = time.perf_counter()
        if not before:
            kind = next((kind for kind in (_OP, _DELTA) if name.startswith(kind)), "")
            self.seconds[kind] += now - self._start
        self._start = time.perf_counter()

    def read(self) -> dict[str, float]:
        found = dict(self.seconds)
        self.seconds = dict.fromkeys(found, 0.0)
        return found


def run_profile(
    base: Path,
    sidecar: Path,
    *,
    prompt: int = 512,
    gen: int = 32,
    n_ubatch: int = 512,
    repeat: int = 5,
    threads: int = 1,
    kv: str = "f16",
    gpu_layers: int = -1,
    seed: int = 0,
) -> Profile:
    """Runs `prompt` random tokens and then `gen` one by one, `repeat` times after a warm-up that is not counted."""
    clock = _Clock()
    with (
        Model.open(base, sidecar, gpu_layers=gpu_layers, untested=True) as model,
        Context(model, prompt + gen, n_ubatch, kv=kv, threads=threads, on_node=clock) as context,
    ):
        ids = np.random.default_rng(seed).integers(0, model.n_vocab, prompt + gen).astype(np.int32)
        found: dict[str, list[dict[str, float]]] = {"prefill": [], "decode": []}
        for i in range(-1, repeat):
            context.clear()
            clock.read()
            context.feed(ids[:prompt])
            prefill = clock.read()
            for k in range(gen):
                context.decode(ids[prompt + k :][:1], prompt + k)
            decode = clock.read()
            if i >= 0:
                found["prefill"].append(prefill)
                found["decode"].append(decode)
        n_layers = len(model.layers)
        return Profile(
            _phase(found["prefill"], prompt, n_layers), _phase(found["decode"], gen, n_layers), context.devices
        )


def _phase(repeats: list[dict[str, float]], n_tokens: int, n_layers: int) -> Phase:
    def median(*kinds: str) -> float:
        return statistics.median(sum(times[kind] for kind in kinds) for times in repeats)

    return Phase(n_tokens, n_layers, median(_OP), median(_DELTA), median(_OP, _DELTA, ""))
