"""The runtime against PyTorch on what no recorded fixture has: gates a head, a trained scale, o normed, all updates."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs llamamem[reference]")
pytest.importorskip("transformers", reason="needs llamamem[reference]")

from make_checkpoint import Memory, bf16, core_specs
from make_fixture import arrays_of

from llamamem.formats.base import BaseModel, read_base
from llamamem.formats.checkpoint.writer import write_checkpoint
from llamamem.formats.gguf_file import GgufTensor
from llamamem.formats.model_fixture import LOGITS
from llamamem.formats.sidecar.layout import DELTA_RULE, RWKV_MS, SOURCE_PREFIX
from llamamem.proof.model_fixtures import check_model_fixture

MODEL_A = Path(__file__).parents[1] / "data" / "model_a"
BASES = ("qwen3_delta", "smollm3_delta", "gemma3_rwkv_ms", "llama_rwkv_ms", "model_a")  # whose bases are taken
N_VARIANTS = 12
# Rounding of texts drawn at random, the base's own included, and of states in which nothing is forgotten; of 60 seeds
# the furthest were 1.2e-4 and 3.3e-5. Whatever is left out or done otherwise is a hundred times as much.
LOGITS_BOUND, STATES_BOUND = 3e-4, 1e-4


def drawn(kind: str, base: BaseModel, rng: random.Random) -> dict[str, Any]:
    """A config that both readers take."""
    heads = rng.choice((("q", "o"), ("q", "k", "v", "o"), ("o",), ("v", "o"), ("k",)))
    layers = [layer.layer for layer in base.layers if layer.k_out is not None or not set(heads) & {"k", "v"}]
    if rng.random() < 0.4:
        layers = sorted(rng.sample(layers, max(1, len(layers) // 2)))
    config: dict[str, Any] = {
        "rank": 8,
        "alpha": rng.choice((16.0, 8.0)),
        "couple_lambda": rng.random() < 0.5,
        "state_update_mode": rng.choice(("standard", "lambda_outside", "no_lambda")),
        "rankwise_gates": rng.random() < 0.5,
        "num_state_heads": rng.choice((1, 1, 2, 4)),
        "delta_heads": list(heads),
        "target_layers": layers,
    }
    if kind == RWKV_MS:
        config |= {
            "memory_backend": RWKV_MS,
            "memory_readout_mode": "delta",
            "rwkv_ms_num_states": rng.choice((1, 2, 4)),
            "rwkv_ms_chunk_size": rng.choice((5, 16)),
            "rwkv_ms_boundary_mode": "fixed_chunk",
            "rwkv_ms_erase_gate": rng.choice((1.0, 0.5)),
            "rwkv_ms_semantics_version": rng.choice((1, 2)),
        }
        return config
    config |= {"normalize_qk": rng.random() < 0.7, "memory_write_granularity": "token"}
    if rng.random() < 0.5:
        config |= {"delta_o_rmsnorm": True, "delta_o_rmsnorm_eps": rng.choice((1e-6, 1e-3))}
    if rng.random() < 0.6:
        config |= {"trainable_delta_scale": True, "delta_scale_granularity": rng.choice(("layer", "head"))}
        config["delta_scale_max"] = rng.choice((2.0, 1.5))
    return config


def tensors_of(kind: str, base: BaseModel, config: dict[str, Any], seed: int) -> list[GgufTensor]:
    rng, hidden = np.random.default_rng(seed), base.hidden
    width = config["rank"] * config["num_state_heads"]
    gates = width if config["rankwise_gates"] else config["num_state_heads"]
    prefix = SOURCE_PREFIX if base.arch == "gemma4" else "model.layers."
    spread = 1.0 if config.get("normalize_qk", True) else 0.35  # longer keys as they are let a state grow without end
    found = []

    def add(name: str, shape: tuple[int, ...], mean: float, std: float) -> None:
        values = (rng.standard_normal(shape) * std + mean).astype(np.float32)
        found.append(GgufTensor(name, "BF16", shape, bf16(values)))

    for layer in base.layers:
        if layer.layer not in config["target_layers"]:
            continue
        attn = f"{prefix}{layer.layer}.self_attn."
        for name in ("memory_q_proj", "memory_k_proj", "memory_v_proj"):
            add(attn + name, (width, hidden), 0.0, spread / hidden**0.5)
        for name, bias in (("beta", -1.5), ("lambda", 1.5)):
            if name == "beta" or not config["couple_lambda"]:
                add(f"{attn}{name}_proj", (gates, hidden), 0.0, 1 / hidden**0.5)
                add(f"{attn}{name}_bias", (gates,), bias, 0.6)
        for head, out in zip("qkvo", (layer.q_out, layer.k_out, layer.v_out, layer.o_out), strict=True):
            if out is not None:
                in_use = head in config["delta_heads"]
                add(f"{attn}delta_{head}_proj", (out, width), 0.0, 0.05 / spread if in_use else 0.0)
        if config.get("trainable_delta_scale"):
            add(attn + "delta_scale_raw", (4 if config["delta_scale_granularity"] == "head" else 1,), 0.0, 1.0)
        if config.get("delta_o_rmsnorm"):
            add(attn + "delta_o_rmsnorm_weight", (layer.o_out,), 0.1, 0.05)
        if kind == RWKV_MS:
            shape = Memory("", hidden, {}, chunk=1, rank=config["rank"], heads=config["num_state_heads"])
            for spec in core_specs(shape, attn + "hrm_rwkv7_core."):
                add(*spec)
    return found


@pytest.mark.parametrize("seed", range(N_VARIANTS))
def test_the_runtime_is_as_pytorch(models: dict[str, Path], seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    kind, place = rng.choice((RWKV_MS, DELTA_RULE)), models.get(rng.choice(BASES), MODEL_A)
    for file in place.iterdir():
        if file.name.startswith(("config", "tokenizer", "model-f32")):
            shutil.copy(file, tmp_path)
    base = read_base(tmp_path / "model-f32.gguf")
    config = drawn(kind, base, rng)
    about = {"base_model": base.name} if kind == RWKV_MS else None
    write_checkpoint(tmp_path / "made", tensors_of(kind, base, config, seed), config, about, format="pt")
    for file in (tmp_path / "made").iterdir():
        shutil.copy(file, tmp_path)
    np.savez_compressed(tmp_path / LOGITS, **arrays_of(tmp_path, seed))
    reports = check_model_fixture(tmp_path, "native", atol=LOGITS_BOUND, atol_states=STATES_BOUND)
    assert reports and not [report for report in reports if not report.ok], config
