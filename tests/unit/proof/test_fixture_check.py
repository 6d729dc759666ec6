"""`llamamem fixture check`: passes on the reference's fixtures, and fails on everything that is wrong."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from llamamem.formats.fixture import FEATURES
from llamamem.reference import oracle

# what is wrong with the maths -> an edit of the oracle's source
READ = '        read[t], routes[t] = read_states(S, f["r"][t], shape)\n'
WRITE = (
    "        if marks[t] == LIVE:\n"
    "            m = (n_past // shape.chunk) % M\n"
    "            S[:, m] = write_state(S[:, m], {name: value[t] for name, value in f.items()}, shape)\n"
    "            n_past += 1\n"
)
MUTANTS = {
    "sign of a": ('"a": -kk', '"a": kk'),
    "read after write": (READ + WRITE, WRITE + READ),
    "no time shift": ("s + (before - s) * core", "s + 0 * core"),
    "time shift by two": ("return table[last[:-1]]", "return table[np.maximum(last[:-1] - 1, 0)]"),
    "chunk off by one": ("(n_past // shape.chunk) % M", "((n_past + 1) // shape.chunk) % M"),
    "states not wrapping": ("(n_past // shape.chunk) % M", "min(n_past // shape.chunk, M - 1)"),
    "transposed write": ('f["v"])[:, :, None] * f["k"][:, None, :]', 'f["v"])[:, None, :] * f["k"][:, :, None]'),
    "decay on rows": ('f["decay"][:, None, :]', 'f["decay"][:, :, None]'),
    "erase left out": ("erased[:, :, None] * f", "0 * erased[:, :, None] * f"),
    "bias of ln_x": ('w["rwkv.ln_x.weight"] * g)', 'w["rwkv.ln_x.weight"] * g + w["rwkv.ln_x.bias"])'),
    "deltas unscaled": ("F32(shape.alpha / shape.rank)", "F32(1)"),
    "final prev is the first": ("table[last[-1]]", "table[1]"),
}
V2_MUTANTS = {
    "no cosine": ("if shape.semantics == 2:\n        score", "if shape.semantics == 3:\n        score"),
    "eps added under the root": (
        "np.maximum(np.sqrt((x * x).sum(axis=-1)), F32(eps))",
        "np.sqrt((x * x).sum(-1) + eps)",
    ),
    "keep is lambda": ("(one, beta, beta) if shape.semantics == 2 else (keep", "(lam, beta, beta) if 1 else (keep"),
}


def mutant(old: str, new: str) -> ModuleType:
    source = inspect.getsource(oracle)
    assert source.count(old) == 1, f"the oracle has no single {old!r} to change"
    module = ModuleType("mutant")
    module.__dict__["__name__"] = oracle.__name__
    exec(compile(source.replace(old, new), "mutant", "exec"), module.__dict__)
    return module


def rewrite(source: Path, target: Path, drop: tuple[str, ...] = (), **changes: Any) -> Path:
    with np.load(source) as file:
        arrays = {name: file[name] for name in file.files if name not in drop}
    np.savez(target, **arrays | changes)
    return target


def layer(layers: list[Path], name: str) -> Path:
    return next(path for path in layers if name in path.name)


def test_reference_fixtures_pass(llamamem: Callable[..., Any], layers: list[Path]) -> None:
    result = llamamem("fixture", "check", *layers, "--atol", "3e-6")
    assert result.status == 0
    assert f"{len(layers)} of {len(layers)} within 3e-06" in result.out
    for tensor in ("routes", "delta_q", "final_S", "final_prev", "final_pos"):
        assert tensor in result.out


def test_json_has_every_tensor(llamamem: Callable[..., Any], layers: list[Path]) -> None:
    result = llamamem("fixture", "check", *layers, "--json")
    report = json.loads(result.out)
    assert result.status == 0 and report["ok"] is True and report["atol"] == 1e-5
    assert [Path(entry["file"]) for entry in report["files"]] == layers
    for entry in report["files"]:
        assert {"s", "beta", "decay", "raw_read", "routes", "out", "delta_o", "final_S"} <= entry["tensors"].keys()
        assert entry["max_abs_diff"] == max(entry["tensors"].values()) <= 3e-6
    assert report["max_abs_diff"]["numpy"] == max(entry["max_abs_diff"] for entry in report["files"])


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_fail(
    name: str, llamamem: Callable[..., Any], layers: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oracle, "eval_layer", mutant(*MUTANTS[name]).eval_layer)
    result = llamamem("fixture", "check", layer(layers, "v1_h64_t64_c4"))
    assert result.status == 1
    assert "FAIL" in result.out and "<- over" in result.out


@pytest.mark.parametrize("name", V2_MUTANTS)
def test_mutants_of_semantics_2_fail(
    name: str, llamamem: Callable[..., Any], layers: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oracle, "eval_layer", mutant(*V2_MUTANTS[name]).eval_layer)
    assert llamamem("fixture", "check", layer(layers, "v2_h64_t64_c16")).status == 1


def test_both_engines_are_checked_each(
    llamamem: Callable[..., Any], layers: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from llamamem.native import layer as compiled

    path = layer(layers, "v1_h64_t7_c4")
    monkeypatch.setattr(compiled, "eval_layer", oracle.eval_layer)
    result = llamamem("fixture", "check", path, "--engine", "both", "--json")
    assert result.status == 0
    assert [entry["engine"] for entry in json.loads(result.out)["files"]] == ["numpy", "native"]
    monkeypatch.setattr(compiled, "eval_layer", mutant(*MUTANTS["sign of a"]).eval_layer)
    result = llamamem("fixture", "check", path, "--engine", "both", "--json")
    assert result.status == 1
    assert [entry["ok"] for entry in json.loads(result.out)["files"]] == [True, False]
    assert llamamem("fixture", "check", path, "--engine", "native").status == 1


def test_a_difference_just_over_atol_fails_and_is_named(
    llamamem: Callable[..., Any], layers: list[Path], tmp_path: Path
) -> None:
    source = layer(layers, "v1_h64_t7_c4")
    with np.load(source) as file:
        final = file["final_S"].copy()
    final[1, 2, 3] += 2e-5
    path = rewrite(source, tmp_path / "off.npz", final_S=final)
    result = llamamem("fixture", "check", path, "--json")
    entry = json.loads(result.out)["files"][0]
    assert result.status == 1 and not entry["ok"]
    assert entry["tensors"]["final_S"] == pytest.approx(2e-5, rel=0.1)
    assert llamamem("fixture", "check", path, "--atol", "1e-4").status == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_is_a_failure_and_null_in_json(
    bad: float, llamamem: Callable[..., Any], layers: list[Path], tmp_path: Path
) -> None:
    source = layer(layers, "v1_h64_t7_c4")
    with np.load(source) as file:
        out = file["out"].copy()
    out[3, 3] = bad
    path = rewrite(source, tmp_path / "nan.npz", out=out)
    result = llamamem("fixture", "check", layers[0], path, "--json", "--atol", "1e30")
    report = json.loads(result.out)
    assert result.status == 1
    assert report["files"][0]["ok"] and report["files"][1]["tensors"]["out"] is None
    assert llamamem("fixture", "check", path).status == 1


# a file of features, from the spec's names; made by the oracle, whose agreement with the reference is tested above
def features(tmp_path: Path, heads: int = 1, semantics: int = 1, **kwargs: Any) -> tuple[dict[str, np.ndarray], Path]:
    rng = np.random.default_rng(3)
    T, N, M, R = 9, heads, 4, 8
    shape = oracle.MemoryShape(0, R, N, M, 4, semantics)
    f = {name: rng.normal(0, 0.5, (T, N, R)).astype(np.float32) for name in FEATURES}
    for name in ("decay", "keep", "erase", "write"):
        f[name] = rng.uniform(0.2, 0.9, (T, N, R)).astype(np.float32)
    if semantics == 2:
        f["keep"], f["erase"] = np.ones_like(f["keep"]), f["write"]
    S = rng.normal(0, 0.5, (N, M, R, R)).astype(np.float32)
    live = rng.random(T) > 0.3
    columns = np.concatenate([f[name].reshape(T, -1) for name in FEATURES], axis=1)
    mask = np.where(live, oracle.LIVE, oracle.PADDING)
    trace = oracle.eval_layer(None, features=columns, S=S, prev=None, n_past=6, shape=shape, mask=mask)
    trace["routes"][~live] = 7.0  # unspecified
    meta = json.dumps({"semantics_version": semantics, "chunk": 4, "num_states": M, "rank": R, "erase_gate": 1.0})
    arrays = {**f, "S0": S, "pos0": np.array(6), "token_mask": live.astype(np.int64), "meta": np.array(meta), **trace}
    path = tmp_path / f"features_{heads}_{semantics}.npz"
    np.savez(path, **arrays)
    return arrays, path


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("semantics", [1, 2])
def test_features_with_a_token_mask(heads: int, semantics: int, llamamem: Callable[..., Any], tmp_path: Path) -> None:
    _, path = features(tmp_path, heads, semantics)
    result = llamamem("fixture", "check", path, "--json")
    assert result.status == 0
    assert json.loads(result.out)["files"][0]["tensors"].keys() == {"raw_read", "routes", "final_S", "final_pos"}


def test_features_check_can_fail(llamamem: Callable[..., Any], tmp_path: Path) -> None:
    arrays, path = features(tmp_path)
    live = arrays["token_mask"] == 1
    for name, row in (("routes", live), ("raw_read", ~live)):  # a padding token must read zero
        changed = arrays[name].copy()
        changed[np.flatnonzero(row)[0]] += 1e-3
        assert llamamem("fixture", "check", rewrite(path, tmp_path / "bad.npz", **{name: changed})).status == 1
    assert (
        llamamem("fixture", "check", rewrite(path, tmp_path / "bad.npz", final_pos=arrays["final_pos"] + 1)).status == 1
    )
    nobody = rewrite(path, tmp_path / "bad.npz", token_mask=np.ones_like(arrays["token_mask"]))
    assert llamamem("fixture", "check", nobody).status == 1


def test_layouts_with_batch_and_head_axes_mean_the_same(llamamem: Callable[..., Any], tmp_path: Path) -> None:
    arrays, path = features(tmp_path, heads=2)
    T = len(arrays["r"])
    vectors = (*FEATURES, "raw_read")
    flat = {name: arrays[name].reshape(T, -1) for name in vectors}
    batched = {name: arrays[name].reshape(1, T, 2, 8) for name in vectors}
    heads_first = {name: arrays[name].reshape(T, 2, 8).swapaxes(0, 1)[None] for name in vectors}
    one_gate = {name: np.full((T, 2, 8), 0.5, np.float32) for name in ("keep", "erase", "write")}
    for layout in (flat, batched | {"S0": arrays["S0"][None]}, heads_first | {"S0": arrays["S0"][None]}):
        assert llamamem("fixture", "check", rewrite(path, tmp_path / "layout.npz", **layout)).status == 0
    full = rewrite(path, tmp_path / "full.npz", **one_gate)
    short = rewrite(path, tmp_path / "short.npz", **{name: np.full((T, 2), 0.5) for name in one_gate})
    a, b = (json.loads(llamamem("fixture", "check", file, "--json").out)["files"][0] for file in (full, short))
    assert a["tensors"] == b["tensors"] and not a["ok"]


def test_two_sequences_in_a_file_are_checked_each(llamamem: Callable[..., Any], tmp_path: Path) -> None:
    arrays, _ = features(tmp_path)
    meta = arrays.pop("meta")
    twice = {name: np.stack([array.squeeze(), array.squeeze()]) for name, array in arrays.items()}
    np.savez(tmp_path / "twice.npz", **twice, meta=meta)
    assert llamamem("fixture", "check", tmp_path / "twice.npz").status == 0
    twice["final_S"][1, 0, 0, 0] += 1e-3
    np.savez(tmp_path / "twice.npz", **twice, meta=meta)
    assert llamamem("fixture", "check", tmp_path / "twice.npz").status == 1


def test_semantics_2_gates_from_before_they_were_set(llamamem: Callable[..., Any], tmp_path: Path) -> None:
    arrays, path = features(tmp_path, semantics=2)
    rng = np.random.default_rng(0)
    raw = {name: rng.uniform(size=arrays[name].shape).astype(np.float32) for name in ("keep", "erase")}
    assert llamamem("fixture", "check", rewrite(path, tmp_path / "raw.npz", **raw)).status == 0
    wrong = raw | {"write": arrays["write"] * 0.9}
    assert llamamem("fixture", "check", rewrite(path, tmp_path / "raw.npz", **wrong)).status == 1


def test_meta_may_leave_out_what_the_arrays_say(
    llamamem: Callable[..., Any], layers: list[Path], tmp_path: Path
) -> None:
    short = json.dumps({"chunk": 16})
    path = rewrite(layer(layers, "v1_h64_t64_c16"), tmp_path / "short.npz", meta=np.array(short))
    assert llamamem("fixture", "check", path).status == 0


@pytest.mark.parametrize(
    ("drop", "changes", "named"),
    [
        (("S0",), {}, "'S0' is missing"),
        (("w.rwkv.x_k",), {}, "'w.rwkv.x_k'"),
        (("pos0",), {}, "'pos0' is missing"),
        (("final_S",), {}, "'final_S' is missing"),
        (tuple(f"w.{n}" for n in ("mem_v",)), {}, "'w.mem_v'"),
        ((), {"h": np.zeros((7, 63), np.float32)}, "'h'"),
        ((), {"out": np.zeros((6, 8), np.float32)}, "'out'"),
        ((), {"w.rwkv.w1": np.zeros((8, 31), np.float32)}, "'w.rwkv.w2'"),
        ((), {"pos0": np.array(-1)}, "'pos0' is negative"),
        ((), {"meta": np.array("{")}, "'meta' is not JSON"),
        ((), {"meta": np.array('{"semantics_version": 3}')}, "semantics version 3"),
        ((), {"meta": np.array('{"num_states": 5}')}, "meta says 5 states"),
        ((), {"meta": np.array('{"chunk": 0}')}, "chunk is 0"),
        ((), {"delta_tokens": np.array([99])}, "'delta_tokens'"),
    ],
)
def test_a_file_that_cannot_be_run_is_one_clear_line(
    drop: tuple[str, ...],
    changes: dict[str, np.ndarray],
    named: str,
    llamamem: Callable[..., Any],
    layers: list[Path],
    tmp_path: Path,
) -> None:
    path = rewrite(layer(layers, "v1_h64_t7_c4"), tmp_path / "broken.npz", drop, **changes)
    result = llamamem("fixture", "check", path)
    assert result.status == 2 and result.out == ""
    assert result.err.startswith(f"llamamem: error: {path}: ") and result.err.count("\n") == 1
    assert named in result.err


def test_files_that_are_no_fixtures(llamamem: Callable[..., Any], tmp_path: Path) -> None:
    np.savez(tmp_path / "pickled.npz", S0=np.array([{}], dtype=object))
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "empty.npz").touch()
    np.save(tmp_path / "single.npy", np.zeros(3))
    for name in ("pickled.npz", "text.npz", "empty.npz", "single.npy", "nowhere.npz"):
        result = llamamem("fixture", "check", tmp_path / name)
        assert result.status == 2
        assert name in result.err and result.err.count("\n") == 1
