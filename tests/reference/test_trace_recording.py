"""Recorded traces: what the reader takes, what a mismatch is located with, and the server's own answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs llamamem[reference]")
pytest.importorskip("transformers", reason="needs llamamem[reference]")

from llamamem.formats.trace import SCHEMA, read_trace  # noqa: E402
from llamamem.proof.conversation_native import started  # noqa: E402
from llamamem.proof.trace import compare_trace  # noqa: E402
from llamamem.reference.conversation import Conversation  # noqa: E402

MODEL_A = Path(__file__).parents[1] / "data" / "model_a"
QUESTION = "hello, who is anna?"


@pytest.fixture
def trace(llamamem: Any, tmp_path: Path) -> Path:
    path = tmp_path / "trace.json"
    adapter = MODEL_A / "sidecar-v1.gguf"
    options = ["--base", MODEL_A, "--adapter", adapter, "--max-tokens", "12", "--output", path]
    done = llamamem("reference", "trace", QUESTION, *options)
    assert done.status == 0, done.err
    return path


def test_it_says_what_the_reference_answers_and_where_it_went_through(trace: Path, loaded: Any, memory: Any) -> None:
    found, raw = read_trace(trace), json.loads(trace.read_text())
    answer = Conversation(loaded, memory).say(QUESTION, 12)
    assert raw["schema"] == SCHEMA and found.generation.greedy and found.generation.prompt == QUESTION
    assert found.result.assistant_display == loaded.text(answer.shown)
    assert found.session.processed_input_ids == (*answer.prompt, *answer.ids[:-1])
    assert raw["session"]["new_ids"] == answer.ids

    steps = raw["steps"]
    assert [step["token"] for step in steps] == list(found.session.processed_input_ids)
    assert [step["top"][0][0] for step in steps[len(answer.prompt) - 1 :]] == answer.ids
    assert {layer: entry["tokens_written"] for layer, entry in steps[-1]["layers"].items()} == {
        str(layer): len(steps) for layer in range(6)
    }
    last = steps[-1]["layers"]["3"]
    assert last["S"][0] == pytest.approx(memory.state[3].S[0, 0].flatten(1).norm(dim=1).tolist(), abs=1e-4)
    assert steps[0]["layers"]["0"]["deltas"] == {"q": 0.0, "o": 0.0} != last["deltas"]


def test_the_server_answers_the_same(trace: Path, tmp_path: Path) -> None:
    found = read_trace(trace)
    with started(MODEL_A / "model-f32.gguf", MODEL_A / "sidecar-v1.gguf", tmp_path, exact_gelu=True) as (client, _):
        compared = compare_trace(client, found)
    assert compared.ok, compared.detail
    assert compared.tokens_equal
