"""One layer: the recorded fixtures, any split, batches and masks like the oracle, and gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs llamamem[reference]")

from llamamem.formats.sidecar import read_sidecar  # noqa: E402
from llamamem.proof.fixtures import check_fixtures  # noqa: E402
from llamamem.reference import oracle, torch_memory  # noqa: E402
from llamamem.reference.oracle import FROZEN, LIVE, PADDING, MemoryShape  # noqa: E402
from llamamem.reference.torch_memory import Memory, MemoryState, from_weights  # noqa: E402

LAYERS = sorted((Path(__file__).parents[1] / "data" / "layers").glob("*.npz"))
MODEL_A = Path(__file__).parents[1] / "data" / "model_a"

T = 23


@pytest.mark.parametrize("path", LAYERS, ids=lambda path: path.stem)
def test_recorded_fixtures(path: Path) -> None:
    (report,) = check_fixtures([path], ["torch"], 1e-5)
    assert report.ok, report.tensors


def test_the_command_runs_it_too(llamamem: Any) -> None:
    done = llamamem("fixture", "check", *LAYERS, "--engine", "torch")
    assert done.status == 0 and f"{len(LAYERS)} of {len(LAYERS)} within" in done.out


def late_source(s: Any, prev: Any, live: Any) -> tuple[Any, Any]:
    """No time shift: the source of this token in place of the one before."""
    return s, s[:, -1]


def equal_routes(y: Any, r: Any, shape: MemoryShape) -> Any:
    return torch.full(y.shape[:-1], 1 / shape.states)


@pytest.mark.parametrize(("name", "mutant"), [("_time_shift", late_source), ("_routes", equal_routes)])
def test_the_fixtures_notice_what_is_wrong(name: str, mutant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_memory, name, mutant)
    assert not all(report.ok for report in check_fixtures(LAYERS, ["torch"], 1e-5))


def layer(semantics: int) -> tuple[dict[str, np.ndarray], MemoryShape]:
    """A trained-looking layer, with a chunk that T tokens go beyond."""
    sidecar = read_sidecar(MODEL_A / f"sidecar-v{semantics}.gguf")
    return sidecar.weights(3), MemoryShape(hidden=sidecar.hidden, states=3, chunk=5, semantics=semantics)


def random_state(shape: MemoryShape, n: list[int]) -> MemoryState:
    generator = torch.Generator().manual_seed(5)
    S = torch.randn(len(n), shape.heads, shape.states, shape.rank, shape.rank, generator=generator)
    return MemoryState(S, torch.randn(len(n), shape.width, generator=generator), torch.tensor(n))


@pytest.mark.parametrize("semantics", [1, 2])
@pytest.mark.parametrize("pieces", [[T], [1] * T, [4, 1, 7, 11]])
def test_a_batch_with_masks_in_any_pieces_is_what_the_oracle_says_of_each_alone(
    semantics: int, pieces: list[int]
) -> None:
    weights, shape = layer(semantics)
    rng = np.random.default_rng(1)
    h = rng.normal(size=(3, T, shape.hidden)).astype(np.float32)
    masks = rng.choice([LIVE, LIVE, FROZEN, PADDING], size=(3, T))
    start = random_state(shape, [0, 7, 13])
    memory, state, deltas = from_weights(weights, shape), start, []
    at = 0
    with torch.no_grad():
        for n in pieces:
            here = slice(at, at + n)
            found, state = memory(torch.tensor(h[:, here]), state, torch.tensor(masks[:, here]))
            deltas.append(found)
            at += n
    for row in range(3):
        expected = oracle.eval_layer(
            weights, h=h[row], S=start.S[row].numpy(), prev=start.prev[row].numpy(), n_past=int(start.n[row]),
            shape=shape, mask=masks[row],
        )  # fmt: skip
        for head in "qkvo":
            got = torch.cat([piece[head][row] for piece in deltas]).numpy()
            np.testing.assert_allclose(got, expected[f"delta_{head}"], atol=1e-5, err_msg=head)
        np.testing.assert_allclose(state.S[row], expected["final_S"], atol=1e-5)
        np.testing.assert_allclose(state.prev[row], expected["final_prev"], atol=1e-5)
        assert state.n[row] == expected["final_pos"]


def test_masked_tokens_leave_the_state_bit_for_bit() -> None:
    weights, shape = layer(1)
    before = random_state(shape, [3])
    h = torch.randn(1, T, shape.hidden)
    with torch.no_grad():
        deltas, after = from_weights(weights, shape)(h, before, torch.tensor([[FROZEN, PADDING] * 11 + [FROZEN]]))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert deltas["o"][0, 0].abs().max() > 0 and deltas["o"][0, 1].abs().max() == 0


@pytest.mark.parametrize("semantics", [1, 2])
def test_gradients_of_all_tokens_at_once_are_those_of_one_by_one(semantics: int) -> None:
    """Through the state across pieces too: what is learnt does not depend on how a text is cut."""
    weights, shape = layer(semantics)
    h = torch.randn(2, T, shape.hidden, generator=torch.Generator().manual_seed(2))

    def gradients(pieces: list[int]) -> dict[str, Any]:
        memory = from_weights(weights, shape, ("q", "o"))
        state, total = memory.fresh(2), torch.zeros(())
        for piece in h.split(pieces, dim=1):
            deltas, state = memory(piece, state)
            total = total + deltas["o"].square().sum() + deltas["q"].sum()
        total.backward()
        return {name: p.grad for name, p in memory.named_parameters() if p.grad is not None}

    whole, single = gradients([T]), gradients([1] * T)
    used = {"memory_v_proj", "beta_proj", "beta_bias", "delta_q_proj", "delta_o_proj"}
    used |= {
        f"hrm_rwkv7_core.{x}" for x in ("x_r", "w1", "a2", "k_k", "key.weight", "receptance.weight", "ln_x.weight")
    }
    assert used <= whole.keys() == single.keys()
    for name, gradient in whole.items():
        scale = max(1.0, float(gradient.abs().max()))
        assert float((gradient - single[name]).abs().max()) <= 2e-4 * scale, name
        assert name not in used or gradient.abs().max() > 0, name


def test_a_new_memory_adds_nothing() -> None:
    memory = Memory(MemoryShape(hidden=16), {"q": 12, "o": 16})
    deltas, state = memory(torch.randn(2, 5, 16), memory.fresh(2))
    assert deltas["q"].shape == (2, 5, 12) and not deltas["q"].any() and not deltas["o"].any()
    assert state.n.tolist() == [5, 5]
