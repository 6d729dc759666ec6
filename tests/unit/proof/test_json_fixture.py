"""Fixtures as JSON, the form of the first implementation, made here of recorded ones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_fixture_check import MUTANTS, layer, mutant

from llamamem.reference import oracle

TYPES = {"<f4": "float32", "<i8": "int64", "|b1": "bool"}


def record(values: Any, dtype: str) -> dict[str, Any]:
    array = np.asarray(values, dtype)
    digest = hashlib.sha256(array.tobytes()).hexdigest()
    return {
        "shape": list(array.shape),
        "dtype": TYPES[array.dtype.str],
        "sha256": digest,
        "data": array.ravel().tolist(),
    }


@pytest.fixture
def fixture(layers: list[Path]) -> dict[str, Any]:
    """Layer `v1_h64_t64_c4_s0` of the PyTorch reference, one sequence with a batch axis, as the seed writes it."""
    with np.load(layer(layers, "v1_h64_t64_c4_s0")) as file:
        arrays = {name: np.asarray(file[name]) for name in file.files}
    n, (rank, states) = len(arrays["h"]), (arrays["S0"].shape[-1], arrays["S0"].shape[-3])

    def heads(name: str) -> Any:
        return np.broadcast_to(arrays[name].reshape(n, -1), (n, rank)).reshape(1, n, 1, rank)

    features = {f"{name}_heads": heads(name) for name in "rkvab"}
    features |= {"w_decay": heads("decay"), "keep": 1 - heads("beta"), "erase": heads("beta"), "write": heads("beta")}
    results = {
        "raw_reads": arrays["raw_read"].reshape(1, n, rank),
        "read_routes_per_head": arrays["routes"].reshape(1, n, 1, states),
        "final_state": arrays["final_S"].reshape(1, 1, states, rank, rank),
    }
    return {
        "schema": "delta_mem_rwkv_ms_math_fixture.v1",
        "source": {"memory_backend": "rwkv_ms"},
        "config": {"layer": 0, "rank": rank, "num_state_heads": 1},
        "delta_mem_config": {"alpha": 16.0, "delta_heads": ["q", "o"], "state_update_mode": "standard"},
        "scan_config": {
            "rwkv_ms_num_states": states,
            "rwkv_ms_chunk_size": 4,
            "rwkv_ms_boundary_mode": "fixed_chunk",
            "rwkv_ms_erase_gate": 1.0,
            "rwkv_ms_read_top_k": 0,
        },
        "inputs": {
            "hidden_states": record(arrays["h"][None], "<f4"),
            "initial_state": record(arrays["S0"].reshape(1, 1, states, rank, rank), "<f4"),
            "initial_positions": record(arrays["pos0"].reshape(1), "<i8"),
            "token_mask": record(np.ones((1, n)), "|b1"),
        },
        "expected": {name: record(values, "<f4") for name, values in (features | results).items()}
        | {"final_positions": record(arrays["final_pos"].reshape(1), "<i8")},
    }


def check(llamamem: Callable[..., Any], path: Path, fixture: Any) -> Any:
    path.write_text(json.dumps(fixture))
    return llamamem("fixture", "check", path, "--atol", "3e-6", "--json")


def test_it_passes(llamamem: Callable[..., Any], fixture: dict[str, Any], tmp_path: Path) -> None:
    result = check(llamamem, tmp_path / "f.json", fixture)
    assert result.status == 0, result.err
    (report,) = json.loads(result.out)["files"]
    assert set(report["tensors"]) == {"raw_read", "routes", "final_S", "final_pos"}


def test_a_token_that_is_masked_is_not_written(
    llamamem: Callable[..., Any], fixture: dict[str, Any], tmp_path: Path
) -> None:
    n = fixture["inputs"]["token_mask"]["shape"][1]
    fixture["inputs"]["token_mask"] = record(np.arange(n)[None] != n - 1, "|b1")
    assert check(llamamem, tmp_path / "f.json", fixture).status == 1


@pytest.mark.parametrize("name", ["sign of a", "read after write", "chunk off by one", "transposed write"])
def test_other_maths_fails(
    name: str, llamamem: Callable[..., Any], fixture: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "sign of a":  # of the features, which the file has
        fixture["expected"]["a_heads"] = record(-np.array(fixture["expected"]["a_heads"]["data"]), "<f4")
        fixture["expected"]["a_heads"]["shape"] = fixture["expected"]["r_heads"]["shape"]
    else:
        monkeypatch.setattr(oracle, "eval_layer", mutant(*MUTANTS[name]).eval_layer)
    assert check(llamamem, tmp_path / "f.json", fixture).status == 1


def test_what_is_wrong_is_named(llamamem: Callable[..., Any], fixture: dict[str, Any], tmp_path: Path) -> None:
    def broken(section: str, **changes: Any) -> dict[str, Any]:
        return {**fixture, section: {**fixture[section], **changes}}

    record = fixture["expected"]["keep"]
    for made, said in (
        ({**fixture, "schema": "other"}, "its schema must be"),
        ({**fixture, "inputs": []}, "'inputs' is missing or not an object"),
        (broken("scan_config", rwkv_ms_read_top_k=2), "rwkv_ms_read_top_k is 2"),
        (broken("expected", keep={**record, "data": [0.5, *record["data"][1:]]}), "expected.keep is damaged"),
        (broken("expected", keep={**record, "shape": [3]}), "expected.keep is damaged"),
        (broken("expected", keep={**record, "dtype": "object"}), "expected.keep is not a record"),
        (broken("inputs", initial_state=None), "inputs.initial_state is not a record"),
    ):
        result = check(llamamem, tmp_path / "f.json", made)
        assert result.status == 2 and said in result.err and result.err.count("\n") == 1, result.err
    (tmp_path / "f.json").write_text('{"schema": ')
    result = llamamem("fixture", "check", tmp_path / "f.json")
    assert result.status == 2 and "f.json" in result.err and result.err.count("\n") == 1


def test_nobody_is_told_to_unpickle(llamamem: Callable[..., Any], tmp_path: Path) -> None:
    np.savez(tmp_path / "objects.npz", S0=np.array([{}], dtype=object))
    (tmp_path / "text.npz").write_text("hello")
    for name in ("objects.npz", "text.npz"):
        result = llamamem("fixture", "check", tmp_path / name)
        assert (
            result.status == 2
            and "pickle" not in result.err.split(name)[1]
            and "not a readable .npz or JSON" in result.err
        )
