"""What llama-server may be told after `--` beside a memory: right, or refused where it starts.

A base that is changed (LoRA, control vectors, rope, metadata) is refused by every profile with a memory:
tests/unit/serving/test_profiles.py.
"""

from __future__ import annotations

import pytest
from server_runs import Serve, generate_clear, random_prompt

from llamamem.errors import LlamamemError

PROMPT = random_prompt(31, 60)
CHANGES_NOTHING = {
    "threads": ["--threads", "2"],
    "load-none": ["--load-mode", "none"],
    "load-mlock": ["--load-mode", "mmap+mlock"],
    "lazy": ["--lazy-mode", "off"],
    "no-repack": ["--no-repack"],
    "swa-full": ["--swa-full"],
    "no-kv-offload": ["--no-kv-offload"],
    "no-host": ["--no-host"],
    "unified": ["--kv-unified"],
    "context-shift": ["--context-shift"],
    "no-fit": ["--fit", "off"],
    "sleep": ["--sleep-idle-seconds", "600"],
    "how threads run": [
        *("--threads-batch", "2", "--poll", "0", "--poll-batch", "0", "--prio", "0", "--prio-batch", "0"),
        *("--cpu-mask", "ff", "--cpu-mask-batch", "ff", "--cpu-strict", "0", "--cpu-strict-batch", "0"),
        *("--numa", "distribute", "--perf", "--threads-http", "2"),
    ],
    "where weights are": [
        *("--override-tensor", r"blk\..*=CPU", "--n-cpu-ffn", "2", "--check-tensors", "--no-op-offload"),
        *("--split-mode", "none", "--main-gpu", "0", "--gpu-layers", "0", "--cpu-moe"),
    ],
    "what is said": [
        *("--special", "--spm-infill", "--keep", "8", "--slot-prompt-similarity", "0", "--metrics"),
        *("--reasoning", "off", "--defrag-thold", "0.1", "--alias", "a", "--timeout", "60", "--verbose"),
    ],
    "backend-sampling": ["--backend-sampling"],
}
ROUNDS_OTHERWISE = {
    "fa-on": ["--flash-attn", "on"],
    "fa-off": ["--flash-attn", "off"],
    "kv-f32": ["--flash-attn", "off", "--cache-type-k", "f32", "--cache-type-v", "f32"],
    "kv-bf16": ["--cache-type-k", "bf16", "--cache-type-v", "bf16"],
}


def answer(serve: Serve, *extra: str) -> tuple[list[int], float, int]:
    """Tokens, their least margin, and how many tokens the memory has seen."""
    running = serve("fused", *extra)
    tokens, margin = generate_clear(running.client, PROMPT, 6, id_slot=0)
    memory = running.client.slots()[0]["rwkv_ms"]
    running.server.stop()
    return tokens, margin, int(memory["tokens_written"])


@pytest.fixture
def plain(serve: Serve) -> tuple[list[int], float, int]:
    return answer(serve)


def test_options_that_change_no_answer_and_no_memory(serve: Serve, plain: tuple[list[int], float, int]) -> None:
    for name, extra in CHANGES_NOTHING.items():
        tokens, _, n_tokens = answer(serve, *extra)
        assert (tokens, n_tokens) == (plain[0], plain[2]), name


def test_options_that_round_otherwise(serve: Serve, plain: tuple[list[int], float, int]) -> None:
    assert plain[1] > 0.01, "choose another prompt: this one leaves the choice to a rounding"
    for name, extra in ROUNDS_OTHERWISE.items():
        tokens, _, n_tokens = answer(serve, *extra)
        assert (tokens, n_tokens) == (plain[0], plain[2]), name


def test_a_kv_type_that_does_not_fit_the_heads_says_so(serve: Serve) -> None:
    """The cause, not only that the context was not made: the heads of this base are 16 wide."""
    with pytest.raises(LlamamemError) as refused:
        serve("fused", "--cache-type-k", "q8_0", "--cache-type-v", "q8_0")
    assert "q8_0" in str(refused.value), str(refused.value)
