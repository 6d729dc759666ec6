"""Sizes and times of a slot file and of its memory alone, from a real server.

    python tools/bench_states.py --model build/bench/wide.gguf --sidecar build/bench/wide-memory.gguf

One slot holds `--tokens` random tokens. Both files are then saved and restored by turns; the times are
the server's own.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from pathlib import Path

from llamamem.native.build import find_build
from llamamem.serving.client import Client
from llamamem.serving.process import launch
from llamamem.serving.profiles import make_plan


def measure(model: Path, sidecar: Path, tokens: int, repeat: int, directory: Path) -> dict[str, dict[str, float]]:
    """By file, `bytes`, and the medians `save_ms` and `restore_ms`."""
    plan = make_plan(
        model.absolute(),
        bin_dir=find_build().bin_dir,
        sidecar=sidecar.absolute(),
        profile="fused",
        ctx_size=2 * tokens,
        port=0,
        slot_dir=directory,
        environ={},
    )
    times: dict[str, list[float]] = {}
    sizes: dict[str, float] = {}
    with launch(plan, directory=directory) as server:
        server.wait_ready()
        with Client(server.url) as client:
            prompt = random.Random(1).choices(range(1000, 2000), k=tokens)
            client.completion(prompt, n_predict=1, cache_prompt=True)
            for _ in range(repeat):
                saved = {"slot file": client.save_slot(0, "slot.bin"), "memory alone": client.save_memory(0, "mem.bin")}
                restored = {
                    "memory alone": client.restore_memory(0, "mem.bin"),
                    "slot file": client.restore_slot(0, "slot.bin"),
                }
                for name in saved:
                    times.setdefault(f"{name} save_ms", []).append(saved[name]["timings"]["save_ms"])
                    times.setdefault(f"{name} restore_ms", []).append(restored[name]["timings"]["restore_ms"])
            for name, file in (("slot file", "slot.bin"), ("memory alone", "mem.bin")):
                sizes[name] = (directory / file).stat().st_size
    return {
        name: {
            "bytes": sizes[name],
            "save_ms": statistics.median(times[f"{name} save_ms"]),
            "restore_ms": statistics.median(times[f"{name} restore_ms"]),
        }
        for name in sizes
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="base GGUF")
    parser.add_argument("--sidecar", type=Path, required=True, help="sidecar GGUF")
    parser.add_argument("--tokens", type=int, default=2000, help="tokens in the slot (default: 2000)")
    parser.add_argument("--repeat", type=int, default=9, help="saves and restores of each (default: 9)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="llamamem-bench-") as directory:
        found = measure(args.model, args.sidecar, args.tokens, args.repeat, Path(directory))
    if args.json:
        print(json.dumps({"tokens": args.tokens, "repeat": args.repeat, **found}))
        return
    print(f"{'':<14}{'bytes':>12}{'save ms':>10}{'restore ms':>12}")
    for name, row in found.items():
        print(f"{name:<14}{row['bytes']:>12,.0f}{row['save_ms']:>10.2f}{row['restore_ms']:>12.2f}")
    whole, alone = found["slot file"], found["memory alone"]
    shares = (f"{key.replace('_ms', '')} {100 * alone[key] / whole[key]:.2f} %" for key in whole)
    print(f"memory alone / slot file: {', '.join(shares)}")


if __name__ == "__main__":
    main()
