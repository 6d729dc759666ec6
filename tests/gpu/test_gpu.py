"""Whole models on a GPU: the same numbers as on the CPU, wherever the layers lie, alone and four at a time.

Run by `make test-gpu` with the CUDA build; skipped where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from llamamem.errors import LlamamemError
from llamamem.native.build import Build, find_build
from llamamem.native.runtime import Context, Model, State, load_library
from llamamem.serving.client import Client
from llamamem.serving.process import launch
from llamamem.serving.profiles import make_plan

DATA = Path(__file__).resolve().parents[1] / "data" / "model_a"
BASE, SIDECAR = DATA / "model-f32.gguf", DATA / "sidecar-v1.gguf"


@pytest.fixture(scope="session")
def build(gpu: str) -> Build:
    try:
        return find_build("cuda")
    except LlamamemError:
        pytest.skip("no CUDA build: llamamem build --backend cuda")


@pytest.fixture(scope="session")
def ids(build: Build) -> np.ndarray:
    load_library(bin_dir=build.bin_dir)
    with np.load(DATA / "logits.npz") as file:
        return file["p1_ids"]


def run(
    ids: np.ndarray, sidecar: Path | None, gpu_layers: int, n_ubatch: int = 512
) -> tuple[np.ndarray, list[State], tuple[str, ...]]:
    """Logits, states of the memory, and the devices on which they lie."""
    with Model.open(BASE, sidecar, gpu_layers=gpu_layers) as model, Context(model, 512, n_ubatch=n_ubatch) as context:
        return context.decode(ids), context.states() if sidecar else [], context.devices


@pytest.mark.parametrize("n_ubatch", [512, 7, 1])
@pytest.mark.parametrize(("gpu_layers", "on_cpu"), [(99, {False}), (9, {True, False}), (3, {True})])
def test_logits_and_states_are_those_of_the_cpu(
    ids: np.ndarray, gpu: str, gpu_layers: int, on_cpu: set[bool], n_ubatch: int, measured: Callable[[str], None]
) -> None:
    """Of 12 layers, 0 to 5 have a memory; the base alone says how far GPU and CPU are from each other."""
    expected, states, _ = run(ids, SIDECAR, 0)
    got, states_gpu, devices = run(ids, SIDECAR, gpu_layers, n_ubatch)
    base = np.abs(run(ids, None, gpu_layers, n_ubatch)[0] - run(ids, None, 0)[0]).max()
    assert np.isfinite(got).all()
    apart = np.abs(got - expected).max()
    S = max(np.abs(other.S - one.S).max() for one, other in zip(states, states_gpu, strict=True))
    measured(
        f"{gpu}: --gpu-layers {gpu_layers}, -ub {n_ubatch}, memory on {' and '.join(devices)}:"
        f" logits {apart:.1e} from the CPU's (the base {base:.1e}), states {S:.1e}"
    )
    assert {device == "CPU" for device in devices} == on_cpu, devices
    assert apart <= 4 * base + 5e-3
    for one, other in zip(states, states_gpu, strict=True):
        assert one.n == other.n
        np.testing.assert_allclose(other.S, one.S, rtol=1e-2, atol=1e-2)


def test_a_zero_scale_is_the_base(ids: np.ndarray) -> None:
    with Model.open(BASE, SIDECAR) as model, Context(model, 512) as context:
        context.set_memory(scale=0.0)
        scaled = context.decode(ids)
    np.testing.assert_array_equal(scaled, run(ids, None, -1)[0])


@pytest.fixture
def client(build: Build, tmp_path: Path) -> Iterator[Client]:
    plan = make_plan(
        BASE,
        bin_dir=build.bin_dir,
        sidecar=SIDECAR,
        profile="batched",
        parallel=4,
        ctx_size=2048,
        port=0,
        slot_dir=tmp_path,
        extra=["--gpu-layers", "99"],
        environ={},
    )
    with launch(plan, directory=tmp_path) as server:
        server.wait_ready()
        with Client(server.url) as found:
            yield found


def test_a_memory_of_each_slot(client: Client) -> None:
    prompts = [list(range(270 + 20 * i, 330 + 20 * i)) for i in range(4)]

    def say(slot: int) -> list[int]:
        answer = client.completion(prompts[slot], n_predict=8, id_slot=slot, return_tokens=True, ignore_eos=True)
        tokens: list[int] = answer["tokens"]
        return tokens

    first = [say(slot) for slot in range(4)]
    for slot in range(4):
        client.save_memory(slot, f"{slot}.bin")
        client.erase_slot(slot)
    assert [say(slot) for slot in range(4)] == first
    for slot in range(4):
        client.restore_memory(3 - slot, f"{slot}.bin")
    norms = [slot["rwkv_ms"]["norms"] for slot in client.slots()]
    assert len({tuple(row) for row in norms}) == 4
