"""Blending, decay and distances of memories."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import state_files as files
from state_files import CONTEXT, MEMORY, SEQUENCE

from llamamem.errors import LlamamemError
from llamamem.formats.state import MADE_BY_TOOL, State, read_state, write_state
from llamamem.formats.state.math import blend, decay, describe, diff, same


def read(folder: Path, file: files.StateFile, name: str = "x") -> State:
    (folder / f"{name}.state").write_bytes(file.bytes())
    return read_state(folder / f"{name}.state")


@pytest.fixture
def a(tmp_path: Path) -> State:
    return read(tmp_path, MEMORY, "a")


@pytest.fixture
def b(tmp_path: Path) -> State:
    """Of a conversation that is longer."""
    later = {i * files.VALUES - 2: 11.0 for i in (1, 2)}
    return read(tmp_path, replace(MEMORY, seed=5, values=later), "b")


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 1.0])
def test_a_blend_by_its_formula(a: State, b: State, alpha: float, tmp_path: Path) -> None:
    mixed = write_state(tmp_path / "m.state", blend(a, b, alpha))
    for name in ("S", "prev"):
        x, y = (getattr(state, name).astype(np.float64) for state in (a, b))
        assert np.array_equal(getattr(mixed, name), ((1 - alpha) * x + alpha * y).astype(np.float32))
    assert a.tokens_written[0, 0] == 3 and b.tokens_written[0, 0] == 11
    assert np.array_equal(mixed.tokens_written, a.tokens_written)
    assert mixed.kind == 4 and mixed.flags == MADE_BY_TOOL
    assert mixed.provenance == f"blend alpha={alpha} a={a.sha256[:12]} b={b.sha256[:12]}"
    assert (mixed.sidecar_sha256, mixed.base_sha256) == (a.sidecar_sha256, a.base_sha256)


def test_a_blend_is_finite_at_the_ends_of_f32(a: State) -> None:
    top = replace(a, S=np.full_like(a.S, np.finfo(np.float32).max))
    assert np.array_equal(blend(top, top, 0.3).S, top.S)
    assert np.isfinite(blend(top, replace(a, S=-top.S), 0.7).S).all()


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.0])
def test_decay_is_of_the_matrices_alone(a: State, factor: float, tmp_path: Path) -> None:
    faded = write_state(tmp_path / "m.state", decay(a, factor))
    assert np.array_equal(faded.S, a.S * np.float32(factor))
    assert np.array_equal(faded.prev, a.prev) and np.array_equal(faded.tokens_written, a.tokens_written)
    assert faded.provenance == f"decay factor={factor} a={a.sha256[:12]}" and faded.made_by_tool


def test_the_same_arguments_give_the_same_bytes(a: State, b: State, tmp_path: Path) -> None:
    for name in ("1", "2"):
        write_state(tmp_path / name, blend(decay(a, 0.5), b, 0.25))
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_the_note_of_a_state_without_a_file_is_that_of_the_file_it_would_be(a: State, b: State, tmp_path: Path) -> None:
    faded = decay(a, 0.5)
    assert blend(faded, b, 0.5).provenance == blend(write_state(tmp_path / "f", faded), b, 0.5).provenance


def test_of_a_sequence_the_memory_is_taken(b: State, tmp_path: Path) -> None:
    sequence = read(tmp_path, SEQUENCE)
    mixed = write_state(tmp_path / "m.state", blend(sequence, b, 0.5))
    assert (mixed.kind, mixed.token_ids.size, mixed.kv_bytes, mixed.origin_tokens) == (4, 0, 0, None)


@pytest.mark.parametrize("number", [-0.1, 1.1, math.nan, math.inf])
def test_numbers_are_from_0_to_1(a: State, number: float) -> None:
    for make in (lambda: blend(a, a, number), lambda: decay(a, number)):
        with pytest.raises(LlamamemError, match=r"is -?[a-z0-9.]+, must be a number from 0 to 1"):
            make()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"sidecar_sha256": "00" * 32}, "state-identity"),
        ({"base_sha256": "00" * 32}, "state-identity"),
        ({"chunk": 6}, "state-shape"),
        ({"semantics": 1}, "state-shape"),
        ({"S": np.zeros((1, 2, 2, 3, 4, 4), np.float32)}, "state-shape"),
        ({"S": np.zeros((1, 2, 2, 4, 2, 2), np.float32)}, "state-shape"),
        ({"S": np.zeros((1, 2, 1, 3, 2, 2), np.float32)}, "state-shape"),
        ({"S": np.zeros((1, 3, 2, 3, 2, 2), np.float32)}, "state-shape"),
    ],
)
def test_states_that_do_not_go_together(change: dict[str, object], reason: str, a: State, b: State) -> None:
    other = replace(b, **change)  # type: ignore[arg-type]
    for work in (lambda: blend(a, other, 0.5), lambda: diff(a, other), lambda: same(a, other)):
        with pytest.raises(LlamamemError) as caught:
            work()
        assert caught.value.reason == reason
        assert str(caught.value).startswith(f"{b.path}: [{reason}] ") and str(a.path) in str(caught.value)


def test_a_whole_context_is_not_worked_on(a: State, tmp_path: Path) -> None:
    whole = read(tmp_path, CONTEXT)
    for work in (
        lambda: blend(whole, a, 0.5),
        lambda: blend(a, whole, 0.5),
        lambda: decay(whole, 1),
        lambda: diff(a, whole),
    ):
        with pytest.raises(LlamamemError, match=r"x\.state: \[state-kind\]"):
            work()


def test_distances(a: State) -> None:
    shifted = replace(a, S=a.S + np.float32(0.5), prev=a.prev - 2, tokens_written=a.tokens_written + 4)
    count = a.S[0, 0].size
    for row in diff(a, shifted):
        assert row.l2 == pytest.approx(0.5 * count**0.5, rel=1e-6) and row.max_abs == pytest.approx(0.5, rel=1e-6)
        assert row.prev_l2 == pytest.approx(2 * a.prev[0, 0].size ** 0.5, rel=1e-6) and row.tokens == 4
    opposite, nothing = replace(a, S=-a.S), replace(a, S=a.S * 0)
    assert [(row.relative, row.cosine) for row in diff(a, opposite)] == [(2.0, pytest.approx(-1.0))] * 2
    assert [(row.relative, row.cosine) for row in diff(a, nothing)] == [(1.0, None)] * 2
    assert [(row.relative, row.cosine) for row in diff(nothing, nothing)] == [(0.0, None)] * 2
    assert [row.cosine for row in diff(a, replace(a, S=3 * a.S))] == [pytest.approx(1.0)] * 2


def test_equal_is_in_everything_a_memory_is(a: State, tmp_path: Path) -> None:
    assert same(a, read(tmp_path, MEMORY))
    assert not same(a, replace(a, S=a.S + np.float32(1e-6)))
    assert not same(a, replace(a, prev=a.prev + np.float32(1e-6)))
    assert not same(a, replace(a, tokens_written=a.tokens_written + np.array([[0, 1]])))


def test_what_is_said_of_a_state(tmp_path: Path) -> None:
    state = read(tmp_path, SEQUENCE)
    state.S[0, 1, 1, 2] = 0
    said = describe(state, [3, 7])
    assert (said["kind"], said["tokens"], said["kv_bytes"], said["sha256"]) == ("sequence", 3, 200, state.sha256)
    (sequence,) = said["sequences"]
    assert (sequence["tokens_written"], sequence["current_chunk"], sequence["current_state"]) == (3, 0, 0)
    assert sequence["origin_tokens"] == 4 + files.M * files.C
    assert [layer["base_layer"] for layer in sequence["layers"]] == [3, 7]
    matrix = sequence["layers"][1]["states"][4]
    assert (matrix["head"], matrix["state"], matrix["live"]) == (1, 1, True)
    assert matrix["norm"] == pytest.approx(np.linalg.norm(state.S[0, 1, 1, 1]))
    assert matrix["max_abs"] == np.abs(state.S[0, 1, 1, 1]).max()
    assert sequence["layers"][1]["states"][5] == {"head": 1, "state": 2, "norm": 0, "max_abs": 0, "live": False}
    assert sequence["layers"][0]["norm"] == pytest.approx(np.linalg.norm(state.S[0, 0]))
    assert sequence["layers"][0]["prev_norm"] == pytest.approx(np.linalg.norm(state.prev[0, 0]))
