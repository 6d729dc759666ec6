"""What parity measures, and what it refuses, against a model that is a table of logits."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from llamamem.errors import LlamamemError
from llamamem.native.runtime import State
from llamamem.proof import parity

VOCABULARY = 11


class TableContext:
    """Stands for runtime.Context: the logits of every position are given."""

    def __init__(self, model: Any, **options: Any):
        self.model = model

    def decode(self, ids: np.ndarray) -> np.ndarray:
        return self.model.table[: len(ids)].copy()

    def states(self) -> list[State]:
        return [State(np.ones((1, 4, 2, 2), np.float32) * i, np.zeros(2, np.float32), 3) for i in range(2)]

    def __enter__(self) -> TableContext:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(parity, "Context", TableContext)
    table = np.random.default_rng(0).standard_normal((8, VOCABULARY)).astype(np.float32)
    return SimpleNamespace(n_vocab=VOCABULARY, table=table)


def test_equal_logits(model: Any) -> None:
    result = parity.measure_parity(model, np.arange(8), model.table)
    assert (result.max_abs_diff, result.median_abs_diff, result.top1_agreement) == (0, 0, 1)
    assert "states" not in result.to_dict()


def test_differences_are_found_wherever_they_are(model: Any) -> None:
    other = model.table.copy()
    other[5, other[5].argmax()] -= 100  # another argmax
    other[2] += 0.25  # none
    result = parity.measure_parity(model, np.arange(8), other)
    assert result.max_abs_diff == pytest.approx(100)
    assert result.worst_token == 5
    assert result.median_abs_diff == 0
    assert result.top1_agreement == 7 / 8
    assert result.argmax_differences == 1


def test_states_are_compared(model: Any) -> None:
    S = np.stack([state.S[0] for state in TableContext(model).states()])  # without the axis of heads
    expected = {"S": S, "prev": np.zeros((2, 2), np.float32), "pos": np.array([3, 3])}
    found = parity.measure_parity(model, np.arange(8), model.table, states=expected).states
    assert found == parity.StateParity(0.0, 0.0, True)
    expected["S"][1, 2, 0, 1] += 0.5
    expected["pos"] = np.array([3, 4])
    found = parity.measure_parity(model, np.arange(8), model.table, states=expected).states
    assert found == parity.StateParity(0.5, 0.0, False)
    with pytest.raises(LlamamemError, match="reference states"):
        parity.measure_parity(model, np.arange(8), model.table, states=expected | {"S": S[:1]})


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_no_numbers_are_refused(model: Any, bad: float) -> None:
    reference = model.table.copy()
    reference[3, 4] = bad
    with pytest.raises(LlamamemError, match="token 3, vocabulary entry 4") as refused:
        parity.measure_parity(model, np.arange(8), reference)
    assert refused.value.exit_status == 2
    reference, model.table = model.table, reference
    with pytest.raises(LlamamemError, match="the model computed NaN") as failed:
        parity.measure_parity(model, np.arange(8), reference)
    assert failed.value.exit_status == 1


@pytest.mark.parametrize("shape", [(7, VOCABULARY), (8, VOCABULARY + 1)])
def test_shapes_that_do_not_fit_are_refused(model: Any, shape: tuple[int, int]) -> None:
    with pytest.raises(LlamamemError, match="shape"):
        parity.measure_parity(model, np.arange(8), np.zeros(shape, np.float32))


@pytest.mark.parametrize("token", [-1, VOCABULARY])
def test_ids_outside_the_vocabulary_are_refused(model: Any, token: int) -> None:
    with pytest.raises(LlamamemError, match="vocabulary"):
        parity.measure_parity(model, np.array([0] * 7 + [token]), model.table)


def test_files_that_are_not_what_they_should_be_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "file.npy"
    for array in (np.zeros((2, 2), np.int64), np.zeros(3), np.zeros(0, np.int64)):
        np.save(file, array)
        with pytest.raises(LlamamemError, match=r"file\.npy: token ids"):
            parity.load_ids(file)
    np.save(file, np.zeros((2, 2), np.int64))
    with pytest.raises(LlamamemError, match=r"file\.npy: logits"):
        parity.load_logits(file)
    np.save(file, np.array([{}], object), allow_pickle=True)
    with pytest.raises(LlamamemError, match=r"file\.npy: not a readable"):
        parity.load_logits(file)
    with pytest.raises(LlamamemError, match="nowhere"):
        parity.load_ids(tmp_path / "nowhere.npy")
    np.savez(tmp_path / "archive.npz", ids=np.arange(3))
    assert parity.load_ids(f"{tmp_path}/archive.npz:ids").tolist() == [0, 1, 2]
    for name in ("", ":", ":other"):
        with pytest.raises(LlamamemError, match=r"archive\.npz.*NAME with one of ids"):
            parity.load_ids(f"{tmp_path}/archive.npz{name}")
    np.savez(tmp_path / "states.npz", S=np.zeros(1))
    with pytest.raises(LlamamemError, match="'prev'"):
        parity.load_states(tmp_path / "states.npz")
