"""The memory on quantised bases against PyTorch on the dequantised ones.

ggml rounds more than the weights: before a product with quantised weights it rounds the activations, to 8 bits a
block. So the reference is run twice on the weights that llama-quantize left: as it is, and with the inputs of its
projections rounded in the same way. How far the second is from the first is how far the runtime may be from it.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs llamamem[reference]")
pytest.importorskip("transformers", reason="needs llamamem[reference]")

from make_checkpoint import Memory, write_checkpoint  # noqa: E402
from quantised_runs import native_memory, to_q8  # noqa: E402

from llamamem.formats.demo_files import demo_files  # noqa: E402
from llamamem.formats.sidecar.copy import rebind_sidecar  # noqa: E402
from llamamem.formats.sidecar.export import export_sidecar  # noqa: E402
from llamamem.native.build import find_build  # noqa: E402
from llamamem.reference import gguf_base  # noqa: E402
from llamamem.reference.attach import attach  # noqa: E402
from llamamem.reference.base import load_base  # noqa: E402
from llamamem.reference.conversation import Conversation  # noqa: E402

TYPES = ("Q8_0", "Q4_0", "Q4_K_M", "Q5_K_S", "IQ4_NL", "BF16", "F16")
DEMO_BASE = demo_files().model.parent / "base"
HIDDEN, LAYERS, HEADS, KV_HEADS, DIM, FULL_DIM = 256, 8, 4, 2, 64, 128
IDS = [2, *np.random.default_rng(3).integers(300, 700, 47).tolist()]
Round = Callable[[Any], Any]

EXACT = 1e-5
# Rounded in another order, a value falls to the other side of a step here and there, and the layers above make more of
# it: the runtime's rounding and the reference's are two draws of one size. Seen: 0.9 times, at most 1.6.
FACTOR = 2.0
ORDER = 2e-3  # sums in another order, with F16 weights and nothing else rounded: 6e-4 in the last layer


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Gemma 4 whose rows are wide enough for every type, with the demo's tokenizer."""
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    folder = tmp_path_factory.mktemp("hf")
    values = json.loads((DEMO_BASE / "config.json").read_text())
    values |= {"hidden_size": HIDDEN, "intermediate_size": 1024, "num_attention_heads": HEADS}
    values |= {"num_key_value_heads": KV_HEADS, "head_dim": DIM, "hidden_size_per_layer_input": 32, "dtype": "float32"}
    values["per_layer_config"] = {layer: {"head_dim": FULL_DIM} for layer in values["per_layer_config"]}
    torch.manual_seed(11)
    model = Gemma4ForCausalLM(Gemma4TextConfig(**values))
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=module.in_features**-0.5)
    model.to(torch.bfloat16).float().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_BASE / name, folder)
    return folder


@pytest.fixture(scope="module")
def files(hugging_face: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same as F32 GGUF, and a sidecar for it."""
    folder = tmp_path_factory.mktemp("gguf")
    base, sidecar = folder / "f32.gguf", folder / "memory.gguf"
    gguf_base.convert_base(hugging_face, base, "random-gemma4")
    full = [kind == "full_attention" for kind in json.loads((DEMO_BASE / "config.json").read_text())["layer_types"]]
    widths = {}
    for layer in range(6):
        dim = FULL_DIM if full[layer] else DIM
        widths[layer] = (HEADS * dim, KV_HEADS * dim, KV_HEADS * dim, HIDDEN)
    write_checkpoint(folder / "checkpoint", Memory("random-gemma4", HIDDEN, widths, chunk=16), seed=4)
    export_sidecar(folder / "checkpoint", base, sidecar)
    return base, sidecar


@pytest.fixture(scope="module")
def runtime() -> Iterator[Callable[..., Any]]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield lambda *args: pool.submit(native_memory, *args).result()


@dataclass(frozen=True)
class Quantised:
    kind: str
    base: Path
    sidecar: Path
    types: dict[str, str]


@pytest.fixture(scope="module", params=TYPES)
def quantised(request: Any, files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Quantised:
    folder = tmp_path_factory.mktemp(request.param)
    base, sidecar = folder / "base.gguf", folder / "memory.gguf"
    program = find_build().bin_dir / "llama-quantize"
    subprocess.run([program, files[0], base, request.param, "1"], check=True, capture_output=True, timeout=120)
    rebind_sidecar(files[1], base, sidecar)
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(base).tensors}
    return Quantised(request.param, base, sidecar, types)


def to_q8_k(x: Any) -> Any:
    """ggml's Q8_K: 256 to a scale, by which the largest is -127."""
    blocks = x.reshape(-1, 256)
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    steps = torch.where(largest != 0, -127 / largest, 0.0)
    rounded = (steps * blocks).round().clamp(max=127)
    return torch.where(largest != 0, rounded / steps, 0.0).reshape(x.shape)


ROUNDS: dict[str, Round] = {
    **dict.fromkeys(("Q8_0", "Q4_0", "Q5_0", "Q5_1", "IQ4_NL"), to_q8),
    **dict.fromkeys(("Q4_K", "Q5_K", "Q6_K"), to_q8_k),
    "BF16": lambda x: x.bfloat16().float(),
    **dict.fromkeys(("F16", "F32"), lambda x: x),  # computed in F32
}


def reference_memory(folder: Path, model: Quantised, *, rounds: bool) -> tuple[np.ndarray, np.ndarray, list[int]]:
    base = load_base(folder, weights=model.base, gelu="ggml")
    for name, module in base.model.named_modules():
        if rounds and isinstance(module, torch.nn.Linear) and name != "lm_head":
            kind = ROUNDS[model.types[gguf_base._name(f"{name}.weight")]]
            module.register_forward_pre_hook(lambda _, args, kind=kind: (kind(args[0]), *args[1:]))
    memory = attach(base.model, model.sidecar)
    Conversation(base, memory).feed(IDS)
    states = list(memory.state.values())
    S, prev = (np.stack([getattr(state, name)[0].numpy() for state in states]) for name in ("S", "prev"))
    return S, prev, [int(state.n) for state in states]


def apart(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of each layer the root mean square of the difference, a part of that of its numbers."""
    assert np.isfinite(a).all() and np.isfinite(b).all()
    axes = tuple(range(1, a.ndim))
    return np.sqrt(((a - b) ** 2).mean(axes) / (b**2).mean(axes))


def test_the_memory_is_that_of_the_reference(quantised: Quantised, hugging_face: Path, runtime: Any) -> None:
    S, prev, n = runtime(quantised.base, quantised.sidecar, IDS)
    plain_S, plain_prev, plain_n = reference_memory(hugging_face, quantised, rounds=False)
    rounded_S, rounded_prev, _ = reference_memory(hugging_face, quantised, rounds=True)
    assert n == plain_n == [len(IDS)] * 6
    for got, plain, rounded in ((S, plain_S, rounded_S), (prev, plain_prev, rounded_prev)):
        far, allowed = apart(got, plain), apart(rounded, plain)
        assert far[0] <= EXACT, "before the first layer's memory no product has quantised weights"
        assert (far <= FACTOR * allowed + ORDER).all(), (far, allowed, far / (allowed + ORDER))
