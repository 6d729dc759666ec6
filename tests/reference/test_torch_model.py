"""A whole model with its memory attached: the recorded logits and states, and what attaching leaves alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs llamamem[reference]")
pytest.importorskip("transformers", reason="needs llamamem[reference]")

from llamamem.errors import LlamamemError  # noqa: E402
from llamamem.formats.state import read_state  # noqa: E402
from llamamem.reference.adapter import read_adapter  # noqa: E402
from llamamem.reference.attach import attach  # noqa: E402
from llamamem.reference.base import load_base  # noqa: E402
from llamamem.reference.conversation import Conversation  # noqa: E402
from llamamem.reference.torch_memory import LIVE, PADDING  # noqa: E402

MODEL_A = Path(__file__).parents[1] / "data" / "model_a"
LOGITS, STATES = 5e-5, 5e-6


def far(a: Any, b: Any) -> float:
    return float(np.abs(np.asarray(a) - np.asarray(b)).max())


def states_far(memory: Any, vectors: dict[str, np.ndarray], prefix: str) -> float:
    states = list(memory.state.values())
    assert [int(state.n) for state in states] == vectors[f"{prefix}_pos"].tolist()
    S, prev = (np.stack([getattr(state, name)[0].numpy() for state in states]) for name in ("S", "prev"))
    return max(far(S[:, 0], vectors[f"{prefix}_S"]), far(prev, vectors[f"{prefix}_prev"]))


@pytest.mark.parametrize(("prompt", "version"), [("p0", 1), ("p1", 1), ("p1", 2)])
@pytest.mark.parametrize("source", ["sidecar", "checkpoint"])
def test_recorded_logits_and_states(
    loaded: Any, vectors: dict[str, np.ndarray], prompt: str, version: int, source: str
) -> None:
    if source == "sidecar":
        memory = attach(loaded.model, MODEL_A / f"sidecar-v{version}.gguf")
    else:
        memory = attach(loaded.model, MODEL_A, "delta_mem_config_v2.json" if version == 2 else None)
    try:
        logits = Conversation(loaded, memory).feed(vectors[f"{prompt}_ids"].tolist(), every=True)
    finally:
        memory.remove()
    assert far(logits, vectors[f"{prompt}_mem_v{version}"]) <= LOGITS
    assert states_far(memory, vectors, f"{prompt}_v{version}") <= STATES


def test_token_by_token(loaded: Any, memory: Any, vectors: dict[str, np.ndarray]) -> None:
    conversation = Conversation(loaded, memory)
    logits = [conversation.feed([token])[0].numpy() for token in vectors["p1_ids"].tolist()]
    assert far(logits, vectors["p1_mem_v1_step"]) <= LOGITS


def test_the_memory_goes_on_when_the_text_is_dropped(loaded: Any, memory: Any, vectors: dict[str, np.ndarray]) -> None:
    conversation = Conversation(loaded, memory)
    conversation.feed(vectors["p0_ids"].tolist())
    conversation.drop_text()
    logits = conversation.feed(vectors["p1_ids"].tolist(), every=True)
    assert far(logits, vectors["p1_mem_v1_after_p0_kvdrop"]) <= LOGITS
    assert states_far(memory, vectors, "p1_v1_after_p0") <= STATES


def test_scale_0_and_hooks_removed_are_the_base_bit_for_bit(
    loaded: Any, memory: Any, vectors: dict[str, np.ndarray]
) -> None:
    ids = vectors["p1_ids"].tolist()
    memory.scale = 0.0
    silent = Conversation(loaded, memory).feed(ids, every=True)
    memory.remove()
    plain = Conversation(loaded).feed(ids, every=True)
    assert torch.equal(silent, plain)
    assert far(plain, vectors["p1_base"]) <= LOGITS


def test_a_frozen_memory_is_read_and_not_written(loaded: Any, memory: Any, vectors: dict[str, np.ndarray]) -> None:
    ids = vectors["p1_ids"].tolist()
    conversation = Conversation(loaded, memory)
    conversation.feed(vectors["p0_ids"].tolist())
    conversation.drop_text()
    before, memory.frozen = memory.state, True
    logits = conversation.feed(ids, every=True)
    assert all(torch.equal(a, b) for i in before for a, b in zip(before[i], memory.state[i], strict=True))
    assert far(logits, vectors["p1_base"]) > 100 * LOGITS


def test_padded_sequences_of_a_batch_are_as_each_alone(loaded: Any, memory: Any) -> None:
    texts = [list(range(300, 340)), list(range(310, 327))]
    alone = []
    for text in texts:
        memory.reset()
        alone.append((Conversation(loaded, memory).feed(text), memory.state))
    width = len(texts[0])
    ids = torch.tensor([[0] * (width - len(text)) + text for text in texts])
    live = torch.tensor([[False] * (width - len(text)) + [True] * len(text) for text in texts])
    memory.reset()
    with torch.inference_mode(), memory.masked(torch.where(live, LIVE, PADDING)):
        positions = (live.cumsum(1) - 1).clamp(min=0)
        out = loaded.model(input_ids=ids, attention_mask=live.long(), position_ids=positions)
    for row, (logits, state) in enumerate(alone):
        assert far(out.logits[row, -1], logits[0]) <= LOGITS
        for layer, one in state.items():
            assert far(memory.state[layer].S[row], one.S[0]) <= STATES
            assert int(memory.state[layer].n[row]) == len(texts[row])
    with pytest.raises(LlamamemError, match="2 sequences, the pass 1"):
        loaded.model(input_ids=ids[:1])


def test_memory_files_are_the_servers(loaded: Any, memory: Any, tmp_path: Path) -> None:
    conversation = Conversation(loaded, memory)
    conversation.feed(list(range(300, 360)))
    conversation.save(tmp_path / "a.memory")
    before = memory.state
    state = read_state(tmp_path / "a.memory", identity=memory.adapter.identity)
    assert state.tokens_written.tolist() == [[60] * 6] and state.current_state.tolist() == [[1] * 6]
    conversation.reset()
    conversation.load(tmp_path / "a.memory")
    assert all(torch.equal(a, b) for i in before for a, b in zip(before[i], memory.state[i], strict=True))
    conversation.feed([300])  # and it goes on from there
    assert {int(state.n) for state in memory.state.values()} == {61}


def test_a_checkpoint_directory_has_no_identity_for_files(loaded: Any, tmp_path: Path) -> None:
    memory = attach(loaded.model, MODEL_A)
    try:
        with pytest.raises(LlamamemError, match="llamamem sidecar export"):
            memory.save(tmp_path / "a.memory")
    finally:
        memory.remove()


def test_an_adapter_for_another_base_is_refused(loaded: Any, tmp_path: Path) -> None:
    adapter = read_adapter(MODEL_A)
    adapter.layers[99] = adapter.layers.pop(5)
    with pytest.raises(LlamamemError, match="target layer 99"):
        attach(loaded.model, adapter)
    adapter.layers[5] = adapter.layers.pop(99)
    adapter.layers[0] = adapter.layers[5]  # a layer of full attention has a wider q
    with pytest.raises(LlamamemError, match="layer 0: delta_q_proj is 128 wide, the base's q 64"):
        attach(loaded.model, adapter)


def test_a_config_that_changes_the_maths_is_refused(tmp_path: Path) -> None:
    shutil.copytree(MODEL_A, tmp_path / "a", ignore=shutil.ignore_patterns("*.gguf", "*.npz"))
    path = tmp_path / "a" / "delta_mem_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rwkv_ms_read_top_k": 2}))
    with pytest.raises(LlamamemError, match="rwkv_ms_read_top_k is 2"):
        read_adapter(tmp_path / "a")


def test_the_multimodal_model_that_e4b_comes_as(loaded: Any, vectors: dict[str, np.ndarray], tmp_path: Path) -> None:
    from transformers import Gemma4Config, Gemma4ForConditionalGeneration

    tower = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = Gemma4Config(text_config=loaded.model.config, vision_config=tower | heads, audio_config=None)
    model = Gemma4ForConditionalGeneration(config)
    model.model.language_model.load_state_dict(loaded.model.model.state_dict())
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(MODEL_A / name, tmp_path)
    base = load_base(tmp_path)
    logits = Conversation(base, attach(base.model, MODEL_A)).feed(vectors["p1_ids"].tolist(), every=True)
    assert far(logits, vectors["p1_mem_v1"]) <= LOGITS
    assert base.vocabulary == loaded.vocabulary and base.stop == loaded.stop


def test_a_base_that_is_none_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(LlamamemError, match=r"the base cannot be loaded .* give a directory"):
        load_base(tmp_path)


def test_the_gelu_of_ggml_is_nearer_to_what_was_recorded_with_it(vectors: dict[str, np.ndarray]) -> None:
    base = load_base(MODEL_A, gelu="ggml")
    logits = Conversation(base).feed(vectors["p1_ids"].tolist(), every=True)
    assert far(logits, vectors["p1_base_gelu16"]) <= 8e-3
    assert far(logits, vectors["p1_base"]) > 50 * LOGITS
