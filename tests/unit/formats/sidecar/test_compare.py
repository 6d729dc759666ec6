"""`llamamem sidecar compare`: is it the same memory, and if not, where does it differ?"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamamem.formats.checkpoint import read_checkpoint
from llamamem.formats.checkpoint.writer import write_checkpoint
from llamamem.formats.gguf_file import GgufTensor
from llamamem.formats.sidecar.compare import compare
from llamamem.formats.sidecar.copy import zero_sidecar
from llamamem.formats.sidecar.export import export_sidecar

SOURCE = "model.language_model.layers.{}.self_attn.{}"
NAME = SOURCE.format(3, "delta_o_proj")


@pytest.fixture
def changed(model_a: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a copy of model_a's checkpoint with other tensors (None: left out) and members of the config."""
    original = read_checkpoint(model_a)

    def write(tensors: dict[str, GgufTensor | None] | None = None, **members: Any) -> Path:
        kept = [tensor for tensor in (original.tensors | (tensors or {})).values() if tensor is not None]
        config = {key: value for key, value in (original.config | members).items() if value is not ...}
        folder = tmp_path / f"copy{len(list(tmp_path.iterdir()))}"
        write_checkpoint(folder, kept, config, {})
        return folder

    return write


def floats(array: Any) -> GgufTensor:
    data = np.asarray(array, "<f4")
    return GgufTensor(NAME, "F32", data.shape, data.tobytes())


def test_the_same(llamamem: Callable[..., Any], exported: Path, model_a: Path) -> None:
    for pair in ((exported, model_a), (model_a, exported), (exported, exported), (model_a, model_a)):
        result = llamamem("sidecar", "compare", *pair)
        assert result.status == 0 and result.out.startswith("the same memory: 186 tensors compared"), result
        answer = json.loads(llamamem("sidecar", "compare", *pair, "--json").out)
        assert answer["same"] is True and answer["tensors"] == [] and answer["tensors_compared"] == 186


def test_other_values(llamamem: Callable[..., Any], exported: Path, tmp_path: Path) -> None:
    zero_sidecar(exported, tmp_path / "z.gguf")
    result = llamamem("sidecar", "compare", exported, tmp_path / "z.gguf")
    assert result.status == 1 and "different: 186 tensors compared, 24 differ; 0 members" in result.out
    assert len([line for line in result.out.splitlines() if line.startswith("blk.")]) == 24
    answer = json.loads(llamamem("sidecar", "compare", exported, tmp_path / "z.gguf", "--json").out)
    entry = next(entry for entry in answer["tensors"] if entry["name"] == "blk.3.delta_o")
    assert entry["shapes"] == [[64, 8], [64, 8]] and entry["bytes"] == [1024, 1024] and entry["max_abs_diff"] > 0.05


def test_what_is_on_one_side_only(model_a: Path, changed: Callable[..., Path]) -> None:
    (difference,) = compare(changed({NAME: None}), model_a).tensors
    assert (difference.name, str(difference)) == ("blk.3.delta_o", "only in B") and difference.max_abs_diff is None
    (difference,) = compare(model_a, changed({NAME: None})).tensors
    assert str(difference) == "only in A" and difference.bytes == (1024, 0)


def test_other_shapes(model_a: Path, changed: Callable[..., Path]) -> None:
    (difference,) = compare(model_a, changed({NAME: floats(np.zeros((2, 3)))})).tensors
    assert str(difference) == "shape [64, 8] and [2, 3]" and difference.max_abs_diff is None


def test_another_type_with_the_same_values(
    llamamem: Callable[..., Any], exported: Path, model_a: Path, tmp_path: Path
) -> None:
    export_sidecar(model_a, model_a / "model-f32.gguf", tmp_path / "wide.gguf", dtype="f32")
    comparison = compare(exported, tmp_path / "wide.gguf")
    assert len(comparison.tensors) == 186 and not comparison.same
    assert {str(difference) for difference in comparison.tensors} == {"BF16 and F32: other bytes, the same values"}
    assert {difference.max_abs_diff for difference in comparison.tensors} == {0.0}
    assert llamamem("sidecar", "compare", exported, tmp_path / "wide.gguf").status == 1


@pytest.mark.parametrize(
    ("a", "b", "difference"),
    [
        ([1.0, 2.0], [1.0, 2.5], 0.5),
        ([0.0, 1.0], [-0.0, 1.0], 0.0),  # other bytes, the same values
        ([np.nan, 1.0], [-np.nan, 1.25], 0.25),
        ([np.nan, 1.0], [3.0, 1.25], np.nan),
        ([np.inf, 1.0], [np.inf, 1.25], 0.25),
        ([np.inf, 1.0], [-np.inf, 1.0], np.inf),
        ([3e38, 1.0], [-3e38, 1.0], 6e38),
    ],
)
def test_differences(a: list[float], b: list[float], difference: float, changed: Callable[..., Path]) -> None:
    comparison = compare(changed({NAME: floats(a)}), changed({NAME: floats(b)}))
    (found,) = comparison.tensors
    assert found.max_abs_diff == pytest.approx(difference, nan_ok=True)
    assert json.dumps(comparison.as_json(), allow_nan=False)


def test_members_of_the_config(llamamem: Callable[..., Any], model_a: Path, changed: Callable[..., Path]) -> None:
    other = changed(rwkv_ms_erase_gate=1, online_gain=..., rank=4, normalize_qk=1)
    result = llamamem("sidecar", "compare", model_a, other, "--json")
    members = {entry["member"]: (entry["a"], entry["b"]) for entry in json.loads(result.out)["config"]}
    assert result.status == 1
    assert members == {
        "rwkv_ms_erase_gate": ("1.0", "1"),
        "online_gain": ("0.05", None),
        "rank": ("8", "4"),
        "normalize_qk": ("true", "1"),
    }
    shown = llamamem("sidecar", "compare", model_a, other).out
    assert "config: online_gain" in shown and "0.05 and not there" in shown and "0 differ; 4 members" in shown


def test_the_order_does_not_count(model_a: Path, tmp_path: Path) -> None:
    original = read_checkpoint(model_a)
    tensors = [replace(t) for t in reversed(original.tensors.values())]
    write_checkpoint(tmp_path / "turned", tensors, dict(reversed(original.config.items())), {})
    assert compare(model_a, tmp_path / "turned").same


def test_a_name_that_no_sidecar_has(model_a: Path, changed: Callable[..., Path]) -> None:
    extra = replace(floats([1.0]), name="something.else")
    (difference,) = compare(model_a, changed({"something.else": extra})).tensors
    assert difference.name.startswith("tensor.") and str(difference) == "only in B"


def test_what_cannot_be_compared(llamamem: Callable[..., Any], exported: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(exported.read_bytes()[:-100])
    for path in (tmp_path / "cut.gguf", tmp_path / "nowhere.gguf", tmp_path):
        result = llamamem("sidecar", "compare", exported, path)
        assert result.status == 2 and str(path) in result.err and result.err.count("\n") == 1 and result.out == ""
