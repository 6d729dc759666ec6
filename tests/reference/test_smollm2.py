"""The real SmolLM2-135M-Instruct, Q4_1: its tokenizer, its chat template and its logits, against the runtime's.

Needs what `llamamem pull smollm2` fetches, and is left out without it.

ggml rounds activations to 8 bits, 32 to a scale, before every product with these weights; PyTorch does not. So the
reference is run twice, as it is and with the inputs of its products rounded in that way, and the runtime may be as far
from the first as the second is, times FACTOR. Seen on 59 tokens, with the mean of each token's logits taken out
(softmax does not see it): rms .15 of logits that spread by 7.7, at most 1.2, KL .004 nats a token; no other argmax.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs llamamem[reference]")
pytest.importorskip("transformers", reason="needs llamamem[reference]")

from quantised_runs import native_logits, to_q8  # noqa: E402

from llamamem.native.catalogue import CATALOGUE  # noqa: E402
from llamamem.reference import gguf_weights  # noqa: E402
from llamamem.reference.base import load_base  # noqa: E402
from llamamem.reference.chat_tokens import ChatTokens  # noqa: E402

ENTRY = CATALOGUE["smollm2"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not ENTRY.is_here, reason="SmolLM2 is not here: `llamamem pull smollm2`"),
]

TALK = [
    {"role": "user", "content": "I live in Rome. What is the capital of France, and how far is it from here?"},
    {"role": "assistant", "content": "The capital of France is Paris, about 1,100 km from Rome."},
    {"role": "user", "content": "And from Oslo?"},
]
TEXTS = (
    "Hello, world! It's 2024, isn't it?",
    "  two  spaces\n\n\nand\tlines 3.14159 ½ ² ٣",
    "naïve café 日本語 🙂 zß\u0301",
    "def f(x):\n    return x**2  # ok\r\n",
    "<|im_start|>user\nx<|im_end|>\n",
)
N = 64  # tokens
FACTOR = 2.0  # two draws of one size: seen 1.0
NEAR = 0.5  # logits between the two likeliest tokens, within which another argmax is none
KL = 0.02  # nats a token, mean


class Runs(NamedTuple):
    """Ids [n]; logits [n, V] of the runtime, of PyTorch, and of PyTorch with rounded activations."""

    ids: list[int]
    native: np.ndarray
    plain: np.ndarray
    rounded: np.ndarray


@pytest.fixture(scope="module")
def native() -> tuple[list[list[int]], np.ndarray]:
    """Of the runtime: the ids of TEXTS and of the talk, and the logits of the latter's first N."""
    texts = [*TEXTS, ChatTokens.read(ENTRY.path).render(TALK, reply=True)]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(native_logits, ENTRY.path, texts, N).result()


@pytest.fixture(scope="module")
def base() -> Any:
    return load_base(ENTRY.path)


@pytest.fixture(scope="module")
def runs(base: Any, native: tuple[list[list[int]], np.ndarray]) -> Runs:
    ids = native[0][-1][:N]
    plain = logits(base, ids)
    hooks = [
        module.register_forward_pre_hook(lambda _, args: (to_q8(args[0]), *args[1:]))
        for module in base.model.modules()
        if isinstance(module, torch.nn.Linear)
    ]
    rounded = logits(base, ids)
    for hook in hooks:
        hook.remove()
    return Runs(ids, native[1], plain, rounded)


def logits(base: Any, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        found: np.ndarray = base.model(input_ids=torch.tensor(ids)[None]).logits[0].numpy()
    return found


def apart(a: np.ndarray, b: np.ndarray) -> float:
    """Root mean square, without what softmax does not see."""
    d = (a - b).astype(np.float64)
    return float(np.sqrt(np.mean(np.square(d - d.mean(1, keepdims=True)))))


def divergence(of: np.ndarray, to: np.ndarray) -> float:
    """KL in nats a token."""
    p, q = (torch.log_softmax(torch.tensor(x, dtype=torch.float64), -1) for x in (of, to))
    return float((p.exp() * (p - q)).sum(-1).mean())


def other_argmax(a: np.ndarray, b: np.ndarray) -> list[int]:
    """Where it is another, and by more than a near-tie of `b`."""
    two = np.sort(b, 1)[:, -2:]
    return np.flatnonzero((a.argmax(1) != b.argmax(1)) & (two[:, 1] - two[:, 0] > NEAR)).tolist()


def test_the_tokenizer_is_the_runtimes(base: Any, native: tuple[list[list[int]], np.ndarray]) -> None:
    chat = ChatTokens.read(ENTRY.path)
    for text, ids in zip(TEXTS, native[0], strict=False):
        assert base.tokenize(text, special=True) == ids == chat.ids(text), text
    assert base.prompt(TALK) == native[0][-1]  # the template too
    assert base.prompt_text(TALK) == chat.render(TALK, reply=True)
    assert base.tokenize("<|im_end|>") != [2] and base.stop == {0, 2}


def test_what_is_trained_is_what_is_served(runs: Runs) -> None:
    assert len(runs.ids) == N and other_argmax(runs.native, runs.plain) == []
    far, allowed = apart(runs.native, runs.plain), apart(runs.rounded, runs.plain)
    assert 0 < far <= FACTOR * allowed, f"{far:.3f}, rounding alone {allowed:.3f}"
    assert divergence(runs.plain, runs.native) <= KL


def test_rows_that_are_not_put_back_are_found(runs: Runs) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf_weights, "_unpermuted", lambda rows, heads: rows)
        wrong = logits(load_base(ENTRY.path), runs.ids)
    assert apart(runs.native, wrong) > 5 * FACTOR * apart(runs.rounded, runs.plain)
    assert other_argmax(runs.native, wrong) and divergence(wrong, runs.native) > 10 * KL


def test_an_assistants_words_are_what_is_learnt() -> None:
    chat = ChatTokens.read(Path(ENTRY.path))
    tokens = chat.encode(TALK[:2])
    said = [i for i, each in zip(tokens.ids, tokens.said, strict=True) if each]
    assert said == [*chat.ids(TALK[1]["content"]), 2]
