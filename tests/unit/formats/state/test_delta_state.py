"""Saved memories of a delta rule: the same block, with its own shape."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from llamamem.cli import app
from llamamem.errors import LlamamemError
from llamamem.formats.sidecar import Sidecar
from llamamem.formats.sidecar.export import export_sidecar
from llamamem.formats.state import State, encode_state, identity_of, read_state, write_state
from llamamem.formats.state.math import blend, decay, diff, same


@pytest.fixture(scope="module")
def sidecar(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Sidecar:
    folder = models["qwen3_delta_msw"]
    return export_sidecar(folder, folder / "model-f32.gguf", tmp_path_factory.mktemp("delta") / "x.gguf")


@pytest.fixture
def state(sidecar: Sidecar, models: dict[str, Path]) -> State:
    """What the original had learnt of a prompt."""
    recorded = np.load(models["qwen3_delta_msw"] / "logits.npz")
    identity = identity_of(sidecar)
    return State(
        S=recorded["p1_S"].reshape(1, 4, 4, 1, 8, 8).astype(np.float32),
        prev=np.zeros((1, 4, 0), np.float32),
        tokens_written=recorded["p1_pos"][None].astype(np.int64),
        chunk=sidecar.chunk,
        semantics=sidecar.semantics,
        sidecar_sha256=identity.sidecar_sha256,
        base_sha256=identity.base_sha256,
    )


def test_by_byte(state: State) -> None:
    data = encode_state(state)
    layers, heads, states, rank, chunk, semantics, cells, values = struct.unpack_from("<8I", data, 12 + 16)
    assert (layers, heads, states, rank, chunk, semantics, cells) == (4, 4, 1, 8, 1 << 24, 0, 1)
    assert values == 4 * 64 + 2
    cell = np.frombuffer(data, "<f4", 4 * values, 12 + 320).reshape(4, values)
    assert (cell[:, -2:] == [101, 0]).all()
    # S[n, i, j] at (n R + j) R + i
    assert cell[2, (3 * 8 + 5) * 8 + 1] == state.S[0, 2, 3, 0, 1, 5] != 0


def test_it_is_read_as_it_was(state: State, sidecar: Sidecar, tmp_path: Path) -> None:
    write_state(tmp_path / "x.state", state)
    read = read_state(tmp_path / "x.state", sidecar=sidecar)
    assert np.array_equal(read.S, state.S) and read.prev.shape == (1, 4, 0)
    assert read.memory_kind == "delta_rule" and (read.tokens_written == 101).all()
    assert same(read, state)


def test_arithmetic(state: State, tmp_path: Path) -> None:
    other = replace(state, S=-state.S)
    assert np.abs(blend(state, other, 0.5).S).max() == 0
    faded = write_state(tmp_path / "y.state", decay(state, 0.25))
    assert np.array_equal(faded.S, state.S * np.float32(0.25)) and faded.made_by_tool
    assert all(row.cosine == pytest.approx(-1) and row.prev_l2 == 0 for row in diff(state, other))


def test_what_people_see(state: State, tmp_path: Path) -> None:
    write_state(tmp_path / "x.state", state)
    said = CliRunner().invoke(app, ["state", "show", str(tmp_path / "x.state")])
    assert said.exit_code == 0
    assert "delta_rule, 4 layers, N 4, R 8" in said.stdout and "101 tokens written\n" in said.stdout
    assert "semantics" not in said.stdout and "chunk" not in said.stdout and "*" not in said.stdout
    assert "|prev|" not in said.stdout
    arguments = ["state", "show", str(tmp_path / "x.state"), "--png", str(tmp_path / "x.png")]
    picture = CliRunner().invoke(app, arguments)
    assert picture.exit_code == 0 and (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_another_kind_is_refused_by_name(state: State, sidecar: Sidecar, model_a: Path, tmp_path: Path) -> None:
    other = export_sidecar(model_a, model_a / "model-f32.gguf", tmp_path / "a.gguf")
    write_state(tmp_path / "x.state", state)
    with pytest.raises(LlamamemError, match="of kind delta_rule, the sidecar is rwkv_ms") as e:
        read_state(tmp_path / "x.state", sidecar=other)
    assert e.value.reason == "state-identity"
    rwkv = replace(state, semantics=1, chunk=48, prev=np.zeros((1, 4, 32), np.float32))
    for a, b, text in ((state, rwkv, "kind rwkv_ms"), (rwkv, state, "kind delta_rule")):
        with pytest.raises(LlamamemError, match=text) as e:
            blend(a, b, 0.5)
        assert e.value.reason == "state-identity"


@pytest.mark.parametrize(
    "change",
    [
        lambda s: {"chunk": 1024},
        lambda s: {"S": s.S.reshape(1, 4, 1, 4, 8, 8)},
        lambda s: {"prev": np.zeros((1, 4, 32), np.float32)},
        lambda s: {"semantics": 1},
    ],
)
def test_a_shape_that_no_delta_rule_has(change: Callable[[State], Any], state: State, tmp_path: Path) -> None:
    with pytest.raises(LlamamemError) as e:
        write_state(tmp_path / "x.state", replace(state, **change(state)))
    assert e.value.reason == "state-shape" and not (tmp_path / "x.state").exists()
