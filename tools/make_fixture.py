"""Makes a whole-model fixture of a folder that has all but the logits: what PyTorch makes of it becomes logits.npz.

    python tools/make_fixture.py FOLDER

FOLDER holds a base in Hugging Face's form (config.json, a tokenizer, weights as safetensors) and as model*.gguf, and an
adapter's checkpoint. Two prompts of random tokens are run in F32: without the memory, with it, on the memory of the
other one with the text dropped, and frozen. `llamamem fixture check FOLDER --engine native` then holds the runtime
against it. Needs llamamem[reference].
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from llamamem.errors import LlamamemError
from llamamem.formats.model_fixture import LOGITS
from llamamem.reference.require import require_torch

LENGTHS = (71, 101)  # tokens


def arrays_of(folder: Path, seed: int) -> dict[str, np.ndarray]:
    """The arrays of logits.npz."""
    require_torch("make_fixture")
    import torch

    from llamamem.reference.attach import attach
    from llamamem.reference.base import load_base
    from llamamem.reference.conversation import Conversation

    torch.set_num_threads(1)  # small tensors are slower on several, by far beside other work
    base = load_base(folder, weights=None if any(folder.glob("*.safetensors")) else next(folder.glob("model*.gguf")))
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, base.vocabulary, n).tolist() for n in LENGTHS]
    made = {f"p{i}_ids": np.array(ids, np.int32) for i, ids in enumerate(prompts)}
    for i, ids in enumerate(prompts):
        made[f"p{i}_base"] = Conversation(base, None).feed(ids, every=True).numpy()
    memory = attach(base.model, folder)

    def run(name: str, ids: list[int], before: list[int] | None = None, frozen: bool = False, state: str = "") -> None:
        conversation = Conversation(base, memory)
        memory.frozen = False
        if before is not None:
            conversation.feed(before)
            conversation.drop_text()
        memory.frozen = frozen
        made[name] = conversation.feed(ids, every=True).numpy()
        memory.frozen = False
        if state:
            values = zip(*memory.state.values(), strict=True)
            for key, layers in zip(("S", "prev", "pos"), values, strict=True):
                stacked = np.stack([layer[0].numpy() for layer in layers])
                if stacked.size:  # a delta rule has no previous source
                    made[f"{state}_{key}"] = stacked

    first, second = prompts
    run("p0_mem", first, state="p0")
    run("p1_mem", second, state="p1")
    run("p1_mem_after_p0_kvdrop", second, before=first, state="p1_after_p0")
    run("p0_mem_frozen_after_p1", first, before=second, frozen=True)
    moved = np.abs(made["p1_mem"] - made["p1_base"]).max()
    if not moved > 0.01:
        raise LlamamemError(
            f"{folder}: the memory moves no logit by more than {moved:.1e}; such a fixture shows nothing"
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes a whole-model fixture of a folder that has all but the logits.")
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    np.savez_compressed(args.folder / LOGITS, **arrays_of(args.folder, args.seed))
    print(args.folder / LOGITS)


if __name__ == "__main__":
    try:
        main()
    except (LlamamemError, OSError) as e:
        print(f"make_fixture: error: {e}", file=sys.stderr)
        sys.exit(2)
