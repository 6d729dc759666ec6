"""What a memory does to the logits of a quantised base, beside what the reference says it does.

The products of a quantised base round the activations to 8 bits, which the reference on the dequantised weights does
not: already the bases differ. The memory's effect, logits with it less logits without, is held against that.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llamamem.errors import LlamamemError

# The roundings of two runs, with and without the memory, add up: sqrt(2) times those of one if they were independent.
# 1.8 was seen at most.
APART = 2.5
SIZE = 0.1  # part by which the sizes of both effects may differ, beside those roundings


@dataclass(frozen=True)
class Effect:
    """Root mean squares over all tokens and the vocabulary."""

    base: float  # how far the bases are apart
    native: float  # size of the memory's effect in the runtime
    reference: float  # and in the reference
    apart: float  # how far the two effects are apart
    states: float  # largest difference of the memories, a part of their largest value

    @property
    def ok(self) -> bool:
        """Both effects have one size, and are as far apart as roundings of the base explain. NaN is not."""
        same_size = abs(self.native - self.reference) <= SIZE * self.reference + self.base
        return bool(same_size and self.apart <= APART * self.base + 1e-4)

    @property
    def summary(self) -> str:
        return (
            f"the memory moves logits by {self.native:.4f} (reference {self.reference:.4f}), {self.apart:.4f} apart;"
            f" the bases are {self.base:.4f} apart; memories differ by {self.states:.1e} of their largest value"
        )

    def as_json(self) -> dict[str, Any]:
        return {"ok": self.ok, **asdict(self)}


def measure_effect(
    model: Path,
    sidecar: Path,
    ids: np.ndarray,
    *,
    mode: str = "batched",
    stream: bool = False,
    threads: int = 1,
    gelu: str = "exact",
) -> Effect:
    """Runs ids through the library that is loaded, and through PyTorch on the GGUF's dequantised weights.

    `stream` reads the weights layer by layer, for a base larger than the machine. Raises LlamamemError.
    """
    base, memory, states = _native(model, sidecar, ids, mode, threads)
    with_torch = _reference(model, sidecar, ids, stream, gelu)
    return compare_effects((base, memory, states), with_torch)


Run = tuple[np.ndarray, np.ndarray, np.ndarray]  # logits [n, V] without and with the memory, S by target layer


def compare_effects(native: Run, reference: Run) -> Effect:
    """What two such runs say."""
    if any(a.shape != b.shape for a, b in zip(native[:2], reference[:2], strict=True)):
        raise LlamamemError(f"logits have shapes {[list(a.shape) for a in (*native[:2], *reference[:2])]}")
    ours, theirs = native[1] - native[0], reference[1] - reference[0]
    far = np.abs(native[2].ravel() - reference[2].ravel()).max() / np.abs(reference[2]).max()
    return Effect(_rms(native[0] - reference[0]), _rms(ours), _rms(theirs), _rms(ours - theirs), float(far))


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x.astype(np.float64)))))


def _native(model: Path, sidecar: Path, ids: np.ndarray, mode: str, threads: int) -> Run:
    from llamamem.native.runtime import Context, Model

    with Model.open(model) as plain, Context(plain, len(ids), threads=threads) as context:
        base = context.decode(ids)
    with Model.open(model, sidecar, mode) as opened, Context(opened, len(ids), threads=threads) as context:
        return base, context.decode(ids), np.stack([state.S for state in context.states()])


def _reference(model: Path, sidecar: Path, ids: np.ndarray, stream: bool, gelu: str) -> Run:
    import torch

    from llamamem.reference.attach import attach
    from llamamem.reference.base import use_ggml_gelu
    from llamamem.reference.gguf_model import load_gguf
    from llamamem.reference.torch_memory import LIVE, PADDING

    loaded = load_gguf(model, stream=stream)
    if gelu == "ggml":
        use_ggml_gelu(loaded)
    memory = attach(loaded, sidecar)
    # one pass, because each reads all weights; padding reads zero, which is the base
    given = torch.tensor(np.asarray(ids, np.int64)).expand(2, -1)
    mask = torch.tensor([[PADDING], [LIVE]]).expand_as(given)
    with torch.no_grad(), memory.masked(mask):
        base, with_memory = loaded(input_ids=given, use_cache=False).logits.numpy()
    return base, with_memory, np.stack([state.S[1].numpy() for state in memory.state.values()])
