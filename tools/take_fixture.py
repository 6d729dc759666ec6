"""Takes a whole-model fixture into tests/data/models, small enough for the repository.

    python tools/take_fixture.py FIXTURE... --output tests/data/models

Kept are the base as GGUF (compressed; its weights are the Hugging Face form's), config and tokenizer, the adapter's
checkpoint, and of logits.npz the base and memory of the second prompt, its memory after the first, and the frozen one.
"""

from __future__ import annotations

import argparse
import lzma
import re
import shutil
from pathlib import Path

import numpy as np

_LEFT_OUT = re.compile(r"p0_base|p0_mem(_v\d)?|p0_(v\d_)?(S|prev|pos)|.*_(step|gelu16)")
_FILES = ("config.json", "generation_config.json", "tokenizer*.json", "delta_mem_*", "adapter_metadata.json")


def take(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for pattern in _FILES:
        for file in source.glob(pattern):
            shutil.copyfile(file, target / file.name)
    for file in source.glob("*.gguf"):
        (target / f"{file.name}.xz").write_bytes(lzma.compress(file.read_bytes(), preset=9 | lzma.PRESET_EXTREME))
    with np.load(source / "logits.npz") as arrays:
        kept = {name: arrays[name] for name in arrays.files if not _LEFT_OUT.fullmatch(name)}
    np.savez_compressed(target / "logits.npz", **kept)


def main() -> None:
    parser = argparse.ArgumentParser(description="Takes whole-model fixtures into tests/data/models.")
    parser.add_argument("fixtures", type=Path, nargs="+", metavar="FIXTURE")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    for fixture in args.fixtures:
        take(fixture, args.output / fixture.name)
        print(args.output / fixture.name)


if __name__ == "__main__":
    main()
