"""Writes tests/data/op-vectors.gguf: small random memory layers run by the NumPy oracle, for the native test of the op.

    python tools/make_op_vectors.py [OUTPUT]

A case `c` has keys `c.sizes` (hidden rank heads states chunk semantics update_mode couple_lambda n_past), `c.alpha` and
`c.erase_gate`, weights `c.w.NAME`, inputs `c.h c.S c.prev c.mask`, and what comes out: `c.trace` [T, 13*D + N*M] as in
`llama_adapter_mem_eval`, `c.delta_q`, `c.delta_o`, `c.final_S`, `c.final_prev`, `c.final_pos`. All F32 but the mask and
final_pos (I32), in torch order. The same NumPy gives the same bytes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import gguf
import numpy as np

from llamamem.reference.oracle import FROZEN, LIVE, PADDING, UPDATE_MODES, MemoryShape, eval_layer

OUTPUT = Path(__file__).parents[1] / "tests" / "data" / "op-vectors.gguf"
TRACE = ("s", "beta", "lam", "r", "w", "decay", "k", "v", "a", "b", "g", "raw_read", "out", "routes")

TOKENS, HIDDEN, LORA, WIDTH = 40, 24, 16, 12

# sizes that the published checkpoint has, and each rule that it does not use
CASES = {
    "semantics1": (MemoryShape(HIDDEN, chunk=7), True),
    "semantics2": (MemoryShape(HIDDEN, chunk=7, semantics=2), True),
    "lambda": (MemoryShape(HIDDEN, chunk=5, couple_lambda=False), True),
    "lambda_outside": (MemoryShape(HIDDEN, chunk=5, couple_lambda=False, update_mode="lambda_outside"), True),
    "no_lambda": (MemoryShape(HIDDEN, chunk=5, update_mode="no_lambda", erase_gate=0.5), True),
    "heads": (MemoryShape(HIDDEN, heads=3, chunk=6), True),
    "gate_a_head": (MemoryShape(HIDDEN, heads=2, chunk=6, semantics=2), False),
    "rank4": (MemoryShape(HIDDEN, rank=4, states=2, chunk=1), True),
}


def make_case(shape: MemoryShape, rankwise: bool, seed: int) -> dict[str, np.ndarray]:
    """Weights, inputs and outputs of one case; the first half of its tokens is live, then some are masked."""
    rng = np.random.default_rng(seed)
    D, gates = shape.width, shape.width if rankwise else shape.heads

    def normal(*size: int, scale: float = 1.0) -> np.ndarray:
        return (scale * rng.standard_normal(size)).astype(np.float32)

    w = {"mem_v": normal(D, HIDDEN, scale=0.3), "beta": normal(gates, HIDDEN, scale=0.3), "beta_b": normal(gates)}
    if not shape.couple_lambda:
        w |= {"lambda": normal(gates, HIDDEN, scale=0.3), "lambda_b": normal(gates) + 1}
    for name in "rwkvag":
        w[f"rwkv.x_{name}"] = rng.random(D, dtype=np.float32)
    for name in ("w0", "a0", "k_k", "k_a", "ln_x.weight"):
        w[f"rwkv.{name}"] = normal(D)
    for name in "wag":
        w |= {f"rwkv.{name}1": normal(D, LORA, scale=0.5), f"rwkv.{name}2": normal(LORA, D, scale=0.25)}
    for name in ("receptance", "key", "value", "output"):
        w[f"rwkv.{name}.weight"] = normal(D, D, scale=1 / np.sqrt(D))
    for name in "qo":
        w[f"delta_{name}"] = normal(WIDTH, D, scale=0.2)

    mask = np.where(np.arange(TOKENS) < TOKENS // 2, LIVE, rng.choice([LIVE, FROZEN, PADDING], TOKENS)).astype(np.int32)
    inputs = {
        "h": normal(TOKENS, HIDDEN),
        "S": normal(shape.heads, shape.states, shape.rank, shape.rank, scale=0.5),
        "prev": normal(D, scale=0.5),
    }
    n_past = 2 * shape.states * shape.chunk + shape.chunk - 3
    trace = eval_layer(w, **inputs, n_past=n_past, shape=shape, mask=mask)
    sizes = [HIDDEN, shape.rank, shape.heads, shape.states, shape.chunk, shape.semantics]
    sizes += [UPDATE_MODES.index(shape.update_mode), int(shape.couple_lambda), n_past]
    return {
        "sizes": np.array(sizes, np.int32),
        **{f"w.{name}": value for name, value in w.items()},
        **inputs,
        "mask": mask,
        "trace": np.concatenate([trace[name].reshape(TOKENS, -1) for name in TRACE], axis=1),
        **{name: trace[name] for name in ("delta_q", "delta_o", "final_S", "final_prev")},
        "final_pos": np.array([trace["final_pos"]], np.int32),
    }


def main() -> None:
    """Writes all cases to the file named on the command line, or to where the test reads them."""
    output = Path(sys.argv[1]) if len(sys.argv) > 1 else OUTPUT
    writer = gguf.GGUFWriter(output, "rwkv_ms_op_vectors")
    writer.add_array("cases", list(CASES))
    for seed, (case, (shape, rankwise)) in enumerate(CASES.items()):
        arrays = make_case(shape, rankwise, seed)
        writer.add_array(f"{case}.sizes", arrays.pop("sizes").tolist())
        writer.add_float32(f"{case}.alpha", shape.alpha)
        writer.add_float32(f"{case}.erase_gate", shape.erase_gate)
        for name, value in arrays.items():
            writer.add_tensor(f"{case}.{name}", np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
