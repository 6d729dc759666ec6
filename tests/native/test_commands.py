"""`llamamem parity`, `llamamem bench` and `llamamem doctor` as a user calls them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.native


@pytest.fixture
def files(tmp_path: Path, reference: dict[str, np.ndarray]) -> Path:
    """ids.npy and logits.npy of prompt 1 with memory."""
    np.save(tmp_path / "ids.npy", reference["p1_ids"])
    np.save(tmp_path / "logits.npy", reference["p1_mem_v1"])
    np.savez(tmp_path / "states.npz", S=reference["p1_v1_S"], prev=reference["p1_v1_prev"], pos=reference["p1_v1_pos"])
    return tmp_path


def parity(cli: Any, files: Path, base: Path, *args: str | Path) -> Any:
    return cli("parity", "--model", base, "--ids", files / "ids.npy", "--logits", files / "logits.npy", *args)


def test_parity_exact_gelu(cli: Any, files: Path, base: Path, sidecars: dict[str, Path]) -> None:
    states = ("--states", files / "states.npz", "--atol", "5e-5")
    done = parity(cli, files, base, "--sidecar", sidecars["v1"], "--exact-gelu", "--json", "--ubatch", "7", *states)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert 0 < result["median_abs_diff"] < result["max_abs_diff"] <= 5e-5
    assert result["top1_agreement"] == 1.0
    assert result["states"]["S_max_abs_diff"] <= 5e-6
    assert result["states"]["tokens_written_equal"]


def test_parity_sees_a_wrong_model(cli: Any, files: Path, base: Path, sidecars: dict[str, Path]) -> None:
    """Without the sidecar, and with the other semantics, the same logits are far off; --atol makes it a failure."""
    for sidecar in ((), ("--sidecar", sidecars["v2"])):
        done = parity(cli, files, base, *sidecar, "--json", "--atol", "0.01")
        assert done.returncode == 1, done.stderr
        assert json.loads(done.stdout)["max_abs_diff"] > 0.05


def test_parity_prints_for_people(cli: Any, files: Path, base: Path, sidecars: dict[str, Path]) -> None:
    done = parity(cli, files, base, "--sidecar", sidecars["v1"], "--kv", "f16")
    assert done.returncode == 0, done.stderr
    assert "top-1 agreement 100.00%" in done.stdout


@pytest.mark.parametrize("fault", ["nan", "rows", "columns", "id", "float-ids", "not-npy"])
def test_parity_refuses_bad_input(
    cli: Any, files: Path, base: Path, reference: dict[str, np.ndarray], fault: str
) -> None:
    ids, logits = reference["p1_ids"].copy(), reference["p1_mem_v1"].copy()
    if fault == "nan":
        logits[5, 7] = np.nan
    elif fault == "rows":
        logits = logits[:-1]
    elif fault == "columns":
        logits = logits[:, :-1]
    elif fault == "id":
        ids[3] = 448
    np.save(files / "ids.npy", ids.astype(np.float32) if fault == "float-ids" else ids)
    np.save(files / "logits.npy", logits)
    if fault == "not-npy":
        (files / "logits.npy").write_text("no array")
    done = parity(cli, files, base)
    assert done.returncode == 2
    assert done.stdout == ""
    errors = done.stderr.strip().splitlines()
    assert len(errors) == 1, done.stderr
    assert errors[0].startswith("llamamem: error: ")


def test_bench_reports_ratios(cli: Any, base: Path, sidecars: dict[str, Path]) -> None:
    arguments = ("--model", base, "--sidecar", sidecars["v1"], "--prompt", "40", "--gen", "4", "--repeat", "2")
    done = cli("bench", *arguments, "--ubatch", "16", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    for part, n_tokens in (("prefill", 40), ("decode", 4), ("prefill_ub1", 40)):
        timing = result[part]
        assert timing["n_tokens"] == n_tokens
        assert len(timing["base"]) == len(timing["sidecar"]) == 2
        assert timing["ratio_median"] == pytest.approx(sum(timing["sidecar"]) / sum(timing["base"]))
        assert timing["ratio_min"] == pytest.approx(min(timing["sidecar"]) / min(timing["base"]))
    table = cli("bench", *arguments)
    assert table.returncode == 0, table.stderr
    assert "decode" in table.stdout


def test_bench_profiles_the_op(cli: Any, base: Path, sidecars: dict[str, Path]) -> None:
    args = ("--model", base, "--sidecar", sidecars["v1"], "--prompt", "32", "--gen", "4", "--repeat", "2", "--profile")
    done = cli("bench", *args, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)["profile"]
    assert result["devices"] == ["CPU"]
    for phase, n_tokens in (("prefill", 32), ("decode", 4)):
        found = result[phase]
        assert (found["n_tokens"], found["n_layers"]) == (n_tokens, 6)
        assert 0 < found["op"] < found["op"] + found["deltas"] < found["nodes"]
        assert found["op_us_per_token_layer"] == pytest.approx(found["op"] / n_tokens / 6 * 1e6)
        assert found["op_share"] == pytest.approx(found["op"] / found["nodes"])
    printed = cli("bench", *args)
    assert "us a token and layer" in printed.stdout and "memory on CPU" in printed.stdout


def test_bench_profiles_nothing_without_a_memory(cli: Any, base: Path) -> None:
    done = cli("bench", "--model", base, "--profile")
    assert done.returncode == 2 and done.stdout == ""
    assert "--profile" in done.stderr and "--sidecar" in done.stderr and done.stderr.count("\n") == 1


def test_doctor_says_where_a_memory_lies(cli: Any) -> None:
    done = cli("doctor", "--json")
    found = {check["id"]: check for check in json.loads(done.stdout)["checks"]}["memory"]
    assert found["ok"] and found["detail"] == "6 layers of the demo model: states on CPU"
