"""`llamamem sidecar inspect` and `validate`: what a file is, and whether it is intact."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFValueType

from llamamem.formats.gguf_file import GgufField, GgufTensor, write_gguf
from llamamem.formats.sidecar import read_sidecar
from llamamem.formats.sidecar.export import export_sidecar
from llamamem.formats.sidecar.inspect import inspect_sidecar, spans

BASE = "model-f32.gguf"


def edited(exported: Path, path: Path, **values: Any) -> Path:
    """A copy with other values of keys, without the prefix."""
    sidecar = read_sidecar(exported)
    fields = dict(sidecar.fields)
    for key, value in values.items():
        fields[f"delta_mem.{key}"] = GgufField(fields[f"delta_mem.{key}"].type, value)
    write_gguf(path, fields, list(sidecar.tensors.values()))
    return path


def damaged(exported: Path, path: Path) -> Path:
    """A copy with a bit of its first and of its last tensor turned."""
    data = bytearray(exported.read_bytes())
    data[-32] ^= 1
    data[data.index(read_sidecar(exported).tensors["blk.0.beta"].data)] ^= 1
    path.write_bytes(data)
    return path


def test_a_screen_answers_the_three_questions(
    llamamem: Callable[..., Any], model_a: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mmproj = tmp_path / "mmproj.gguf"
    clip = {"general.architecture": GgufField(GGUFValueType.STRING, "clip")}
    write_gguf(mmproj, clip, [GgufTensor("x", "F32", (1,), bytes(4))])
    path = tmp_path / "a.gguf"
    export_sidecar(model_a, model_a / BASE, path, mmproj=mmproj, checkpoint_repo="somewhere/a")
    monkeypatch.chdir(tmp_path)
    result = llamamem("sidecar", "inspect", "a.gguf")
    assert result.status == 0 and result.err == ""
    lines = result.out.splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 80
    assert re.search(r"^memory for +tiny-random-gemma4-a$", result.out, re.M)
    assert BASE in result.out and hashlib.sha256((model_a / BASE).read_bytes()).hexdigest() in result.out
    assert "mmproj.gguf" in result.out and "somewhere/a" in result.out
    assert re.search(r"^  sliding +0-4: q 64, k 32, v 32, o 64$", result.out, re.M)
    assert re.search(r"^  full +5: q 128, k 64, v 64, o 64$", result.out, re.M)
    assert "q o (k v: in the file, not used)" in result.out
    assert "rank 8, alpha 16, state heads 1, states 4" in result.out and "48 tokens, fixed_chunk" in result.out
    assert "186 BF16, 31 a layer" in result.out and f"{path.stat().st_size:,} bytes" in result.out
    assert hashlib.sha256(path.read_bytes()).hexdigest() in result.out
    assert lines[-1].startswith("intact")


def test_a_damaged_file_is_shown_with_what_is_wrong(
    llamamem: Callable[..., Any], exported: Path, tmp_path: Path
) -> None:
    result = llamamem("sidecar", "inspect", damaged(exported, tmp_path / "bad.gguf"))
    assert result.status == 2 and "intact" not in result.out and "tiny-random-gemma4-a" in result.out
    wrong = [line for line in result.out.splitlines() if line.startswith("DAMAGED")]
    assert len(wrong) == 2 and all("[tensor-hash]" in line for line in wrong) and "'blk.0.beta'" in wrong[0]

    (tmp_path / "cut.gguf").write_bytes(exported.read_bytes()[:-1000])
    result = llamamem("sidecar", "inspect", tmp_path / "cut.gguf", "--tensors")
    assert result.status == 2 and "[truncated]" in result.out and BASE in result.out
    assert re.search(r"^blk\.0\.beta +\[8, 64\] +BF16 +1024 +\?$", result.out, re.M)


def test_a_hostile_file_fits_the_screen_too(llamamem: Callable[..., Any], exported: Path, tmp_path: Path) -> None:
    path = edited(exported, tmp_path / "x.gguf", base_model="x" * 500 + "\n", base_gguf="\x1b[31mred\n\u202e")
    result = llamamem("sidecar", "inspect", path)
    assert "\x1b" not in result.out and "\u202e" not in result.out
    assert len(result.out.splitlines()) <= 24 and max(map(len, result.out.splitlines()[1:])) <= 80
    odd = '[{"layer":1e400,"attention_kind":["a long one"]},5,{"q_out":"\\ud800"}]'
    path = edited(exported, tmp_path / "y.gguf", per_layer_attention_json=odd, config_json="{", alpha=float("nan"))
    result = llamamem("sidecar", "inspect", path)
    assert result.status == 2 and len(result.out.splitlines()) <= 24
    assert all(len(line) <= 80 for line in result.out.splitlines()[1:] if not line.startswith("DAMAGED"))
    answer = json.loads(llamamem("sidecar", "inspect", path, "--json").out)
    assert answer["ok"] is False and answer["metadata"]["delta_mem.alpha"] == "nan"
    assert answer["metadata"]["delta_mem.config_json"] == "{"


@pytest.mark.parametrize("name", ["nowhere.gguf", "text.gguf", "cut.gguf", "."])
def test_a_file_with_nothing_to_show(name: str, llamamem: Callable[..., Any], exported: Path, tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("hello")
    (tmp_path / "cut.gguf").write_bytes(exported.read_bytes()[:4000])
    for verb in ("inspect", "materialize", "zero"):
        more = () if verb == "inspect" else ("--output", tmp_path / "out")
        result = llamamem("sidecar", verb, tmp_path / name, *more)
        assert result.status == 2 and result.out == "" and result.err.count("\n") == 1
        assert re.search(r": \[(unreadable|not-gguf|truncated)\] ", result.err) and not (tmp_path / "out").exists()


def test_everything_for_machines(llamamem: Callable[..., Any], exported: Path, model_a: Path) -> None:
    answer = json.loads(llamamem("sidecar", "inspect", exported, "--json").out)
    assert answer["ok"] is True and answer["findings"] == []
    assert answer["bytes"] == exported.stat().st_size
    assert answer["sha256"] == hashlib.sha256(exported.read_bytes()).hexdigest()
    assert answer["metadata"].keys() == read_sidecar(exported).fields.keys()
    assert answer["metadata"]["delta_mem.config_json"] == json.loads((model_a / "delta_mem_config.json").read_text())
    assert len(answer["metadata"]["delta_mem.tensor_manifest_json"]) == len(answer["tensors"]) == 186
    beta = answer["tensors"][0]
    assert (beta["name"], beta["shape"], beta["type"], beta["bytes"]) == ("blk.0.beta", [8, 64], "BF16", 1024)
    assert beta["abs_max"] == float(abs(read_sidecar(exported).weights(0)["beta"]).max())


def test_the_list_of_tensors(llamamem: Callable[..., Any], exported: Path) -> None:
    out = llamamem("sidecar", "inspect", exported, "--tensors").out
    assert len(re.findall(r"^blk\.", out, re.M)) == 186
    assert re.search(r"^blk\.5\.rwkv\.receptance\.weight +\[8, 8\] +BF16 +128 +0\.\d+$", out, re.M)


def test_with_a_checkpoint(llamamem: Callable[..., Any], exported: Path, model_a: Path, tmp_path: Path) -> None:
    result = llamamem("sidecar", "inspect", exported, "--memory-dir", model_a)
    assert result.status == 0 and "the same memory: 186 tensors compared" in result.out
    for path in model_a.glob("*adapter*"):
        shutil.copy(path, tmp_path)
    config = json.loads((model_a / "delta_mem_config.json").read_text())
    (tmp_path / "delta_mem_config.json").write_text(json.dumps(config | {"rank": 9}))
    result = llamamem("sidecar", "inspect", exported, "--memory-dir", tmp_path)
    assert result.status == 1 and "8 and 9" in result.out
    answer = json.loads(llamamem("sidecar", "inspect", exported, "--memory-dir", model_a, "--json").out)
    assert answer["comparison"]["same"] is True


def test_spans() -> None:
    assert spans([0, 1, 2, 5, 7, 8]) == "0-2 5 7-8" and spans([]) == "" and spans(["a", None, True]) == "a None True"


def test_a_manifest_of_a_damaged_file_needs_no_manifest(exported: Path, tmp_path: Path) -> None:
    found = inspect_sidecar(edited(exported, tmp_path / "x.gguf", tensor_manifest_json="["))
    assert not found.intact and found.manifest()["tensors"] == "["


# validate


def test_a_valid_file(llamamem: Callable[..., Any], exported: Path, model_a: Path) -> None:
    for base in ((), ("--base", model_a / BASE)):
        result = llamamem("sidecar", "validate", exported, *base)
        assert result.status == 0 and result.err == ""
        assert result.out == f"{exported}: ok (186 tensors, 67808 bytes)\n"


def test_all_findings(llamamem: Callable[..., Any], exported: Path, tmp_path: Path) -> None:
    path = damaged(exported, tmp_path / "bad.gguf")
    result = llamamem("sidecar", "validate", path)
    assert result.status == 2 and len(result.out.splitlines()) == 2
    assert all(line.startswith(f"{path}: [tensor-hash] tensor 'blk.") for line in result.out.splitlines())
    answer = json.loads(llamamem("sidecar", "validate", path, "--json").out)
    assert answer["path"] == str(path) and answer["ok"] is False
    assert [finding["reason"] for finding in answer["findings"]] == ["tensor-hash"] * 2
    assert answer["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_another_base(llamamem: Callable[..., Any], exported: Path, model_a: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes((model_a / BASE).read_bytes() + b"x")
    result = llamamem("sidecar", "validate", exported, "--base", other)
    assert result.status == 2 and "[base-hash]" in result.out
    assert hashlib.sha256(other.read_bytes()).hexdigest() in result.out
    assert read_sidecar(exported).base_sha256 in result.out


def test_a_file_that_is_not_there(llamamem: Callable[..., Any], tmp_path: Path) -> None:
    result = llamamem("sidecar", "validate", tmp_path / "nowhere.gguf", "--json")
    answer = json.loads(result.out)
    assert result.status == 2 and answer["sha256"] is None and answer["findings"][0]["reason"] == "unreadable"


@pytest.mark.parametrize(
    ("says", "status", "disagrees"),
    [(None, 0, False), ("sidecar 'x': [key-missing] key", 2, True), ("no memory left", 2, True)],
)
def test_the_runtime_is_asked(
    says: str | None,
    status: int,
    disagrees: bool,
    llamamem: Callable[..., Any],
    exported: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from llamamem.native import runtime

    monkeypatch.setattr(runtime, "loader_refusal", lambda path: says, raising=False)
    result = llamamem("sidecar", "validate", exported, "--runtime")
    assert result.status == status and ("the runtime's loader says" in result.out) is disagrees
    answer = json.loads(llamamem("sidecar", "validate", exported, "--runtime", "--json").out)
    assert answer["runtime"]["loads"] is (says is None) and answer["ok"] is not disagrees


def test_the_runtime_may_agree_that_it_is_wrong(
    llamamem: Callable[..., Any], exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llamamem.native import runtime

    path = damaged(exported, tmp_path / "bad.gguf")
    monkeypatch.setattr(runtime, "loader_refusal", lambda path: f"sidecar '{path}': [tensor-hash] x", raising=False)
    result = llamamem("sidecar", "validate", path, "--runtime")
    assert result.status == 2 and "the runtime's loader" not in result.out
    monkeypatch.setattr(runtime, "loader_refusal", lambda path: None)
    assert "says ok, the validator tensor-hash" in llamamem("sidecar", "validate", path, "--runtime").out
