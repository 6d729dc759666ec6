"""A plain KV cache beside a memory of either kind: reuse, checkpoints, states, names of the request's object."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import httpx
import pytest
from model_fixtures import unpack
from server_runs import Running, generate, random_prompt, started

from llamamem.formats.sidecar.export import export_sidecar
from llamamem.native.build import find_build

Serve = Callable[..., Running]


@pytest.fixture(params=["qwen3_delta", "llama_rwkv_ms"])
def serve(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Serve]:
    folder = unpack(request.param, tmp_path)
    base, sidecar = folder / "model-f32.gguf", tmp_path / "memory.gguf"
    export_sidecar(folder, base, sidecar)
    with ExitStack() as stack:
        yield partial(started, stack, find_build(), tmp_path, base, sidecar)


def prompt(seed: int, n: int) -> list[int]:
    return [10 + token % 240 for token in random_prompt(seed, n)]


def test_text_that_goes_on_is_not_read_again_and_an_edit_returns_to_a_checkpoint(serve: Serve) -> None:
    running = serve("batched", parallel=1)
    first = prompt(1, 300)
    answer = generate(running.client, first, 16, cache_prompt=True)
    follow_up = [*first, *answer["tokens"], *prompt(2, 40)]
    second = generate(running.client, follow_up, 4, cache_prompt=True)
    assert (second["timings"]["prompt_n"], second["timings"]["cache_n"]) == (41, 315)

    edited = [*first, *prompt(3, 30)]  # the answer is another one
    again = generate(running.client, edited, 24, cache_prompt=True)
    assert 200 < again["timings"]["cache_n"] <= 300
    fresh = generate(running.client, edited, 24, cache_prompt=False)
    assert again["tokens"] == fresh["tokens"] and fresh["timings"]["prompt_n"] == len(edited)


def test_a_slot_on_disk_and_a_memory_alone(serve: Serve) -> None:
    running = serve("batched", parallel=2)
    client = running.client
    first = prompt(4, 120)
    answer = generate(client, first, 8, cache_prompt=True, id_slot=0)
    client.save_slot(0, "turn.bin")
    follow_up = [*first, *answer["tokens"], *prompt(5, 12)]
    expected = generate(client, follow_up, 24, cache_prompt=True, id_slot=0)
    generate(client, prompt(6, 90), 8, cache_prompt=True, id_slot=0)
    client.restore_slot(0, "turn.bin")
    continued = generate(client, follow_up, 24, cache_prompt=True, id_slot=0)
    assert continued["tokens"] == expected["tokens"] and continued["timings"]["prompt_n"] <= 13

    told = generate(client, first, 1, memory_adapter={"return_memory": True})["memory_adapter"]
    with_it = generate(client, prompt(7, 20), 1, memory_adapter={"memory": told["memory"]})
    without = generate(client, prompt(7, 20), 1, memory_adapter={})
    assert with_it["memory_adapter"]["tokens_written"] == told["tokens_written"] + 20
    assert without["memory_adapter"]["tokens_written"] == 20


def test_the_object_has_two_names(serve: Serve) -> None:
    running = serve("batched", parallel=2)
    props = running.client.props()
    assert props["memory_adapter"] == props["rwkv_ms"]
    assert props["memory_adapter"]["kind"] in ("delta_rule", "rwkv_ms")
    assert all(slot["memory_adapter"] == slot["rwkv_ms"] for slot in running.client.slots())
    for name, other in (("memory_adapter", "rwkv_ms"), ("rwkv_ms", "memory_adapter")):
        answer = generate(running.client, prompt(8, 20), 1, **{name: {"frozen": True}})
        assert answer[name]["tokens_written"] == 0 and other not in answer
    both = {"prompt": prompt(8, 20), "n_predict": 1, "memory_adapter": {}, "rwkv_ms": {}}
    refused = httpx.post(f"{running.client.url}/completion", json=both, timeout=60)
    assert refused.status_code == 400 and "two names" in refused.json()["error"]["message"]
