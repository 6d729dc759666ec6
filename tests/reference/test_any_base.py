"""Both kinds of memory on five bases: recorded logits and states, and the mistakes that they must find."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from model_fixtures import NAMES

torch = pytest.importorskip("torch", reason="needs llamamem[reference]")
pytest.importorskip("transformers", reason="needs llamamem[reference]")

from llamamem.errors import LlamamemError  # noqa: E402
from llamamem.proof.model_fixtures import CaseReport, check_model_fixture  # noqa: E402
from llamamem.reference import attach as attaching  # noqa: E402
from llamamem.reference import delta_oracle, gguf_weights, torch_delta  # noqa: E402
from llamamem.reference.adapter import read_adapter  # noqa: E402
from llamamem.reference.attach import attach  # noqa: E402
from llamamem.reference.base import load_base  # noqa: E402
from llamamem.reference.conversation import Conversation  # noqa: E402
from llamamem.reference.delta_oracle import DeltaShape  # noqa: E402
from llamamem.reference.gguf_model import load_gguf  # noqa: E402
from llamamem.reference.oracle import FROZEN, LIVE, PADDING  # noqa: E402
from llamamem.reference.torch_delta import DeltaMemory  # noqa: E402

MODEL_A = Path(__file__).parents[1] / "data" / "model_a"
Patch = Callable[[pytest.MonkeyPatch], None]


@pytest.mark.parametrize("name", [*NAMES, "model_a"])
def test_recorded_logits_and_states(models: dict[str, Path], name: str) -> None:
    """One pass, the memory of another text, frozen: of the weights as the runtime's file has them."""
    reports = check_model_fixture(models.get(name, MODEL_A), "torch")
    assert reports and all(report.ok for report in reports), [report for report in reports if not report.ok]
    assert sum(report.states is not None for report in reports) >= 2 and all(not r.argmax_differences for r in reports)


@pytest.mark.parametrize("name", ["qwen3_delta", "gemma3_rwkv_ms"])
def test_in_pieces_it_is_the_same(models: dict[str, Path], name: str) -> None:
    """The base's KV cache goes on from piece to piece: transformers renames what its attention takes as one."""
    folder = models[name]
    base = load_base(folder, weights=folder / "model-f32.gguf")
    with np.load(folder / "logits.npz") as arrays:
        ids = arrays["p1_ids"].tolist()
        expected = arrays["p1_mem" if "p1_mem" in arrays else "p1_mem_v1"]
    conversation = Conversation(base, attach(base.model, folder))
    edges = [0, 1, 2, 40, 47, len(ids)]
    pieces = [conversation.feed(ids[a:b], every=True) for a, b in pairwise(edges)]
    assert float(np.abs(torch.cat(pieces).numpy() - expected).max()) <= 5e-5


def read_after_write(patch: pytest.MonkeyPatch) -> None:
    right = torch_delta.recurrence

    def late(S: Any, *rest: Any) -> Any:
        history, last = right(S, *rest)
        return torch.cat([history[1:], last[None]]), last

    patch.setattr(torch_delta, "recurrence", late)


def unnormalised_k(patch: pytest.MonkeyPatch) -> None:
    right = DeltaMemory._features

    def wrong(self: Any, h: Any) -> Any:
        return right(self, h) | {"k": torch.tanh(torch.nn.functional.linear(h, self.memory_k_proj))}

    patch.setattr(DeltaMemory, "_features", wrong)


def scale_by_width(patch: pytest.MonkeyPatch) -> None:
    """alpha over N R instead of R."""
    right = DeltaMemory._delta
    patch.setattr(DeltaMemory, "_delta", lambda self, head, read: right(self, head, read) / self.shape.heads)


def coupled_lambda(patch: pytest.MonkeyPatch) -> None:
    right = DeltaMemory._features
    patch.setattr(DeltaMemory, "_features", lambda self, h: (f := right(self, h)) | {"lam": 1 - f["beta"]})


def rows_not_permuted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(gguf_weights, "_unpermuted", lambda rows, heads: rows)


def delta_after_the_q_norm(patch: pytest.MonkeyPatch) -> None:
    def hook(self: Any, layer: int, memory: Any, attention: Any) -> None:
        def before(module: Any, args: Any, kwargs: Any) -> None:
            self._deltas[layer] = self._run(layer, memory, kwargs["hidden_states"])

        attention.register_forward_pre_hook(before, with_kwargs=True)
        for head in memory.delta_heads:
            where = {"q": "q_norm", "k": "k_norm"}.get(head, f"{head}_proj")

            def add(module: Any, args: Any, out: Any, head: str = head) -> Any:
                return out + self._deltas[layer][head].reshape(out.shape)

            getattr(attention, where).register_forward_hook(add)

    patch.setattr(attaching.Attached, "_hook", hook)


@pytest.mark.parametrize(
    ("name", "mistake"),
    [
        ("qwen3_delta", read_after_write),
        ("smollm3_delta", unnormalised_k),
        ("qwen3_delta_msw", scale_by_width),
        ("qwen3_delta_msw", coupled_lambda),
        ("smollm3_delta", rows_not_permuted),
        ("llama_rwkv_ms", rows_not_permuted),
        ("qwen3_delta", delta_after_the_q_norm),
        ("gemma3_rwkv_ms", delta_after_the_q_norm),
    ],
)
def test_a_mistake_is_found(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str, mistake: Patch
) -> None:
    mistake(monkeypatch)
    far: list[CaseReport] = [r for r in check_model_fixture(models[name], "torch") if not r.ok]
    assert any(report.logits > 100 * report.atol for report in far), [(r.case, r.logits) for r in far]


@pytest.mark.parametrize("name", NAMES)
def test_a_gguf_alone_is_the_same_base(models: dict[str, Path], name: str) -> None:
    """Its keys say what config.json does."""
    model = load_gguf(models[name] / "model-f32.gguf")
    with np.load(models[name] / "logits.npz") as arrays, torch.no_grad():
        ids, expected = torch.tensor(arrays["p1_ids"])[None], arrays["p1_base"]
    assert float((model(input_ids=ids).logits[0] - torch.tensor(expected)).abs().max()) <= 5e-5


def test_a_gguf_is_run_layer_by_layer(models: dict[str, Path]) -> None:
    folder = models["smollm3_delta"]
    model = load_gguf(folder / "model-f32.gguf", stream=True)
    memory = attach(model, folder)
    with np.load(folder / "logits.npz") as arrays, torch.no_grad():
        logits = model(input_ids=torch.tensor(arrays["p1_ids"])[None]).logits[0]
        assert float(np.abs(logits.numpy() - arrays["p1_mem"]).max()) <= 5e-5
    assert all(parameter.is_meta for parameter in model.model.layers.parameters()) and len(memory.layers) == 8
    with pytest.raises(LlamamemError, match="cannot be run layer by layer"):
        load_gguf(models["gemma3_rwkv_ms"] / "model-f32.gguf", stream=True)


def test_a_config_of_another_base_is_refused(models: dict[str, Path]) -> None:
    with pytest.raises(LlamamemError, match=r"config and tensors differ|the config says"):
        load_base(models["llama_rwkv_ms"], weights=models["qwen3_delta"] / "model-f32.gguf")


def test_all_layers_are_meant_where_none_is_named(models: dict[str, Path]) -> None:
    adapter = read_adapter(models["qwen3_delta"])
    assert adapter.kind == "delta_rule" and list(adapter.layers) == [0, 1, 2, 3] and adapter.prefix == "model.layers."
    assert read_adapter(models["qwen3_rwkv_ms"]).kind == "rwkv_ms"


@pytest.mark.parametrize("mode", ["standard", "lambda_outside", "no_lambda"])
@pytest.mark.parametrize(
    ("heads", "per_head", "normalize", "scale", "norm"),
    [(1, False, True, 0, False), (3, True, True, 1, False), (2, False, True, 4, True), (2, True, False, 0, True)],
)
def test_a_layer_is_what_the_oracle_says(
    mode: str, heads: int, per_head: bool, normalize: bool, scale: int, norm: bool
) -> None:
    """Every rule, a batch with masks, in pieces."""
    rng = np.random.default_rng(heads)
    shape = DeltaShape(24, 4, heads, 6.0, mode, False, normalize, scale_max=1.7)
    D, G = shape.width, heads if per_head else shape.width
    sizes: dict[str, tuple[int, ...]] = {f"mem_{x}": (D, 24) for x in "qkv"}
    sizes |= {"beta": (G, 24), "beta_b": (G,), "lambda": (G, 24), "lambda_b": (G,)}
    sizes |= {"delta_q": (7, D), "delta_k": (3, D), "delta_v": (3, D), "delta_o": (24, D)}
    sizes |= ({"delta_scale": (scale,)} if scale else {}) | ({"delta_o_norm": (24,)} if norm else {})
    weights = {name: rng.normal(0, 0.3, size).astype(np.float32) for name, size in sizes.items()}
    if not normalize:  # an unnormalised key above length 1 makes any state grow without bounds
        weights["mem_k"] *= 0.2
    h = rng.normal(size=(2, 19, 24)).astype(np.float32)
    marks = rng.choice([LIVE, LIVE, FROZEN, PADDING], size=(2, 19))
    memory, found = torch_delta.from_weights(weights, shape), []
    state = start = memory.fresh(2)._replace(S=torch.tensor(rng.normal(size=(2, heads, 1, 4, 4)), dtype=torch.float32))
    with torch.no_grad():
        for a, b in ((0, 1), (1, 12), (12, 19)):
            deltas, state = memory(torch.tensor(h[:, a:b]), state, torch.tensor(marks[:, a:b]))
            found.append(deltas)
    for row in range(2):
        given = {"h": h[row], "S": start.S[row, :, 0].numpy(), "shape": shape, "mask": marks[row]}
        expected = delta_oracle.eval_layer(weights, **given)
        whole = torch_delta.eval_layer(weights, **given)
        for head in "qkvo":
            got = torch.cat([piece[head][row] for piece in found]).numpy()
            np.testing.assert_allclose(got, expected[f"delta_{head}"], atol=1e-5, rtol=1e-5, err_msg=head)
            np.testing.assert_allclose(whole[f"delta_{head}"], expected[f"delta_{head}"], atol=1e-5, rtol=1e-5)
        np.testing.assert_allclose(state.S[row, :, 0], expected["final_S"], atol=1e-5, rtol=1e-5)
        assert state.n[row] == expected["final_pos"] == whole["final_pos"]


def test_a_gate_of_a_head_is_not_that_of_a_row() -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(AssertionError):
        patch.setattr(torch.Tensor, "repeat_interleave", lambda x, n, dim: x.repeat(1, 1, n))
        test_a_layer_is_what_the_oracle_says("standard", 3, True, True, 1, False)


def test_gradients_reach_every_parameter_that_has_an_effect() -> None:
    memory = DeltaMemory(DeltaShape(hidden=16), {"q": 12, "k": 4, "v": 4, "o": 16})
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.normal_(0.0, 0.3)
    deltas, state = memory(torch.randn(2, 9, 16), memory.fresh(2))
    (deltas["q"].sum() + deltas["o"].square().sum() + state.S.sum()).backward()
    without = {name for name, p in memory.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == {"delta_k_proj", "delta_v_proj"}
