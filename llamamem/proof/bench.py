"""What the memory costs: base and sidecar timed against each other in one process.

The same base is loaded twice, once with the sidecar; the weights are mapped, so both read the same pages. In every
repeat the two run the same tokens by turns, one microbatch of the prompt or one generated token each, and who goes
first alternates, so that what else the machine does meets both alike. The ratios say more than the times.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llamamem.errors import LlamamemError
from llamamem.native.runtime import Context, Model

CONTRAST_TOKENS = 64  # prefill at -ub 1 is slow: this many tokens of the prompt are enough for a rate
CONTRAST_STEP = 8  # and this many of them at a turn


@dataclass(frozen=True)
class Timing:
    """Seconds of every repeat, pair by pair, for `n_tokens` tokens each: by the clock, and of CPU time.

    CPU time leaves out what other processes took; with several threads it counts their waiting for each other too.
    """

    n_tokens: int
    base: list[float] = field(default_factory=list)
    sidecar: list[float] = field(default_factory=list)
    base_cpu: list[float] = field(default_factory=list)
    sidecar_cpu: list[float] = field(default_factory=list)

    @property
    def ratio_median(self) -> float:
        """Median of sidecar over median of base."""
        return statistics.median(self.sidecar) / statistics.median(self.base)

    @property
    def ratio_min(self) -> float:
        """Fastest sidecar over fastest base."""
        return min(self.sidecar) / min(self.base)

    @property
    def ratio_cpu(self) -> float:
        """Ratio of the medians of CPU time."""
        return statistics.median(self.sidecar_cpu) / statistics.median(self.base_cpu)

    @property
    def ratio_pairs(self) -> list[float]:
        """Sidecar over base, repeat by repeat."""
        return [s / b for s, b in zip(self.sidecar, self.base, strict=True)]

    def rate(self, which: str) -> float:
        """Tokens a second at the median, of `base` or `sidecar`."""
        return self.n_tokens / statistics.median(getattr(self, which))

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the figures and every repeat behind them."""
        return {
            **asdict(self),
            "base_tokens_per_s": self.rate("base"),
            "sidecar_tokens_per_s": self.rate("sidecar"),
            "ratio_median": self.ratio_median,
            "ratio_min": self.ratio_min,
            "ratio_cpu": self.ratio_cpu,
            "ratio_pair_median": statistics.median(self.ratio_pairs),
            "ratio_pairs": self.ratio_pairs,
        }


@dataclass(frozen=True)
class Bench:
    """`prefill` and `decode` at the asked-for microbatch, `prefill_ub1` for contrast; `devices` hold the states."""

    prefill: Timing
    decode: Timing
    prefill_ub1: Timing
    devices: tuple[str, ...] = ()

    @property
    def ub1_slowdown(self) -> float:
        """How many times longer a prompt token takes at -ub 1, with the sidecar."""
        return self.prefill.rate("sidecar") / self.prefill_ub1.rate("sidecar")

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        timings = {name: getattr(self, name).to_dict() for name in ("prefill", "decode", "prefill_ub1")}
        return {**timings, "ub1_slowdown": self.ub1_slowdown, "devices": list(self.devices)}


def run_bench(
    base: Path,
    sidecar: Path | None,
    *,
    prompt: int = 512,
    gen: int = 32,
    n_ubatch: int = 512,
    repeat: int = 5,
    threads: int = 1,
    kv: str = "f16",
    gpu_layers: int = -1,
    seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> Bench:
    """Times `base` alone against `base` with `sidecar` (None: against itself, which shows the machine's own noise).

    `prompt` and `gen` are tokens, `progress` is told what is being done. Random token ids from `seed`, the same for
    both; one warm-up of each kind is not counted; the caches are cleared between repeats.
    """
    if min(prompt, gen, repeat, n_ubatch, threads) < 1:
        raise LlamamemError("--prompt, --gen, --repeat, --ubatch and --threads must be at least 1")
    n_contrast = min(prompt, CONTRAST_TOKENS)
    with ExitStack() as stack:
        progress("loading the base twice, once with the sidecar")
        models = [
            stack.enter_context(Model.open(base, side, gpu_layers=gpu_layers, untested=True))
            for side in (None, sidecar)
        ]
        ids = np.random.default_rng(seed).integers(0, models[0].n_vocab, prompt + gen).astype(np.int32)

        def open_pair(size: int) -> list[Context]:
            n_ctx = prompt + gen
            made = (Context(model, n_ctx=n_ctx, n_ubatch=size, kv=kv, threads=threads) for model in models)
            return [stack.enter_context(context) for context in made]

        pair, pair_ub1 = open_pair(n_ubatch), open_pair(1)
        timings = {"prefill": Timing(prompt), "decode": Timing(gen), "prefill_ub1": Timing(n_contrast)}
        for i in range(-1, repeat):  # -1 warms up
            progress("warming up" if i < 0 else f"repeat {i + 1} of {repeat}")
            first = i % 2
            seconds = {
                "prefill": _by_turns(pair, Context.feed, ids[:prompt], 0, n_ubatch, first),
                "decode": _by_turns(pair, Context.decode, ids[prompt:], prompt, 1, first),
                "prefill_ub1": _by_turns(pair_ub1, Context.feed, ids[:n_contrast], 0, CONTRAST_STEP, first),
            }
            for context in (*pair, *pair_ub1):
                context.clear()
            if i >= 0:
                for name, (wall, cpu) in seconds.items():
                    timing = timings[name]
                    for store, value in zip(
                        (timing.base, timing.sidecar, timing.base_cpu, timing.sidecar_cpu), (*wall, *cpu), strict=True
                    ):
                        store.append(value)
    return Bench(**timings, devices=pair[1].devices)


def _by_turns(
    pair: list[Context], run: Callable[..., Any], ids: np.ndarray, pos: int, step: int, first: int
) -> tuple[list[float], list[float]]:
    """Both contexts run `ids` from `pos` in steps, by turns; the seconds of each, by the clock and of CPU time."""
    wall, cpu = [0.0, 0.0], [0.0, 0.0]
    for turn, i in enumerate(range(0, len(ids), step)):
        part = ids[i : i + step]
        for which in (0, 1) if (turn + first) % 2 == 0 else (1, 0):
            start, cpu_start = time.perf_counter(), time.process_time()
            run(pair[which], part, pos + i)
            wall[which] += time.perf_counter() - start
            cpu[which] += time.process_time() - cpu_start
    return wall, cpu
