"""All findings at once, the base as a part of them, and the one list of reasons that docs and both readers share."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from sidecar_edits import attention_of, config_with, edited

from llamamem.errors import LlamamemError
from llamamem.formats.gguf_file import GgufField, GgufTensor, read_gguf_index
from llamamem.formats.sidecar import REASONS, Sidecar, read_sidecar, validate_sidecar

ROOT = Path(__file__).parents[4]
BASE = "model-f32.gguf"
U32 = gguf.GGUFValueType.UINT32


def found(path: Path, base: Path | None = None) -> list[str]:
    return [finding.reason for finding in validate_sidecar(path, base).findings]


def test_a_good_sidecar_has_none(exported: Path, model_a: Path) -> None:
    hashed: list[int] = []
    result = validate_sidecar(exported, model_a / BASE, hashed.append)
    assert result.findings == () and sum(hashed) == (model_a / BASE).stat().st_size
    assert result.sidecar == read_sidecar(exported)


def test_every_fault_is_found_in_the_order_of_the_checks(exported: Path, tmp_path: Path) -> None:
    sidecar = read_sidecar(exported)
    nan = np.frombuffer(sidecar.tensors["blk.3.mem_v"].data, "<u2").copy()
    nan[0] = 0x7FC0
    tensors = [replace(t, data=nan.tobytes()) if t.name == "blk.3.mem_v" else t for t in sidecar.tensors.values()]
    tensors = [t for t in tensors if t.name != "blk.1.beta"] + [GgufTensor("blk.1.new", "BF16", (8,), bytes(16))]
    keys = {
        "tensor_name_format": "plain",
        "delta_mem.new": GgufField(U32, 1),
        "base_gguf_sha256": "0",
        "total_bytes": 1,
        **config_with(sidecar, rank=True, memory_fusion_mode="gate", a_new_one=1, alpha=1.0),
    }
    path = edited(sidecar, tmp_path / "bad.gguf", keys, tensors)
    result = validate_sidecar(path)
    assert result.sidecar is None
    assert [(finding.reason, finding.message.split(" is ")[0].split(":")[0]) for finding in result.findings] == [
        ("key-unknown", "unknown key 'delta_mem.new'"),
        ("unsupported", "key 'delta_mem.tensor_name_format'"),
        ("key-value", "key 'delta_mem.base_gguf_sha256'"),
        ("config-unknown", "config_json"),
        ("config-unsupported", "config_json"),
        ("config-value", "config_json"),
        ("disagree", "key 'delta_mem.alpha'"),
        ("disagree", "key 'delta_mem.total_bytes'"),
        ("tensor-missing", "tensor 'blk.1.beta'"),
        ("tensor-nonfinite", "tensor 'blk.3.mem_v' holds NaN or infinity, first at value 0"),
        ("tensor-unknown", "tensor 'blk.1.new'"),
    ]
    with pytest.raises(LlamamemError) as caught:
        read_sidecar(path)
    assert str(caught.value) == f"{path}: [key-unknown] {result.findings[0].message}"


def test_nothing_else_of_another_version_is_looked_at(exported: Path, tmp_path: Path) -> None:
    values = {"format_version": 3, "schema": "x", "delta_mem.new": GgufField(U32, 1), "rank": 1}
    assert found(edited(read_sidecar(exported), tmp_path / "bad.gguf", values)) == ["format-version"]


@pytest.mark.parametrize(
    ("values", "reasons"),
    [
        ({"format_version": None}, ["key-missing"]),
        ({"config_json": None}, ["key-missing"]),
        ({"config_json": "{}"}, ["config-missing"] * 14),
        ({"target_layers_json": "[0,"}, ["json-invalid"]),
        ({"per_layer_attention_json": "{}"}, ["json-type"]),
        ({"delta_heads_json": "3"}, ["json-type"]),
        ({"tensor_manifest_json": "3"}, ["json-type"]),
        ({"rank": None}, ["key-missing"]),
    ],
)
def test_what_depends_on_a_refused_key_is_left_out(
    values: dict[str, Any], reasons: list[str], exported: Path, tmp_path: Path
) -> None:
    assert found(edited(read_sidecar(exported), tmp_path / "bad.gguf", values)) == reasons


def test_tensors_are_checked_even_if_it_is_not_known_whose_they_are(exported: Path, tmp_path: Path) -> None:
    data = bytearray(edited(read_sidecar(exported), tmp_path / "bad.gguf", {"target_layers_json": "3"}).read_bytes())
    data[-32] ^= 1
    (tmp_path / "bad.gguf").write_bytes(data)
    assert found(tmp_path / "bad.gguf") == ["json-type", "tensor-hash"]


# the base


def base_with(model_a: Path, path: Path, **values: Any) -> Path:
    """A header of the base with other values of keys and no tensors but a few bytes."""
    index = read_gguf_index(model_a / BASE)
    writer = gguf.GGUFWriter(path, values.pop("architecture", "gemma4"))
    for key, field in index.fields.items():
        name = key.removeprefix("gemma4.")
        if key.startswith("gemma4.") or name in values:
            value = values.get(name, field.value)
            sub = None if not isinstance(value, list) else gguf.GGUFValueType.get_type(value[0])
            writer.add_key_value(key, value, field.type, sub_type=sub)
    if "split.count" in values:
        writer.add_uint16("split.count", values["split.count"])
    dropped = values.get("dropped", ())
    for info in index.tensors:
        if info.name not in dropped:
            writer.add_tensor_info(info.name, info.shape, np.dtype("<f4"), 0, raw_dtype=info.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return path


def test_another_file_of_the_same_model(exported: Path, model_a: Path, tmp_path: Path) -> None:
    base = base_with(model_a, tmp_path / "base.gguf")
    result = validate_sidecar(exported, base)
    (finding,) = result.findings
    assert finding.reason == "base-hash" and result.sidecar is not None
    for part in (str(base), str(exported), result.sidecar.base_sha256):
        assert part in finding.message
    assert len(re.findall("[0-9a-f]{64}", finding.message)) == 2


def test_a_split_base_of_another_architecture(exported: Path, model_a: Path, tmp_path: Path) -> None:
    base = base_with(model_a, tmp_path / "base.gguf", architecture="llama", **{"split.count": 3})
    assert found(exported, base) == ["base-architecture", "base-split"]


def test_a_base_of_other_figures(exported: Path, model_a: Path, tmp_path: Path) -> None:
    sidecar = read_sidecar(exported)
    for change in ({"q_out": 32}, {"attention_kind": "full_attention"}, {"k_out": None}):
        first, *rest = attention_of(sidecar)
        tensors = [
            replace(t, shape=(32, 8), data=t.data[:512]) if t.name == "blk.0.delta_q" and "q_out" in change else t
            for t in sidecar.tensors.values()
            if t.name != "blk.0.delta_k" or "k_out" not in change
        ]
        entries = json.dumps([first | change, *rest])
        path = edited(sidecar, tmp_path / "x.gguf", {"per_layer_attention_json": entries}, tensors)
        (finding,) = validate_sidecar(path, model_a / BASE).findings
        assert finding.reason == "base-shape" and "layer 0" in finding.message
    path = with_targets(sidecar, tmp_path / "x.gguf", [0, 1, 2, 3, 4, 99])
    (finding,) = validate_sidecar(path, model_a / BASE).findings
    assert finding.reason == "base-shape" and "layer 99" in finding.message


def test_deltas_of_keys_and_values_that_a_layer_does_not_have(exported: Path, model_a: Path, tmp_path: Path) -> None:
    sidecar = read_sidecar(exported)
    shared = read_gguf_index(model_a / BASE).get("gemma4.attention.shared_kv_layers")
    n_layers = read_gguf_index(model_a / BASE).get("gemma4.block_count")
    assert shared and n_layers - 1 > 5
    heads = {"delta_heads_json": '["q","k","v","o"]', **config_with(sidecar, delta_heads=["q", "k", "v", "o"])}
    entries = [entry | {"active_delta_heads": ["q", "k", "v", "o"]} for entry in attention_of(sidecar)]
    path = edited(sidecar, tmp_path / "kv.gguf", heads | {"per_layer_attention_json": json.dumps(entries)})
    assert found(path, model_a / BASE) == []
    base = base_with(model_a, tmp_path / "base.gguf", dropped=["blk.2.attn_v.weight"])
    assert found(path, base) == ["base-heads", "base-heads", "base-hash"]  # of k, of v
    path = with_targets(read_sidecar(path), tmp_path / "kv7.gguf", [0, 1, 2, 3, 4, n_layers - 1])
    assert found(path, model_a / BASE) == ["base-heads", "base-heads"]


def with_targets(sidecar: Sidecar, path: Path, targets: list[int]) -> Path:
    """The last of the target layers becomes another."""
    last, new = sidecar.layers[-1].layer, targets[-1]
    entries = attention_of(sidecar)
    entries[-1] |= {"layer": new}
    edits = {
        "target_layers_json": json.dumps(targets),
        "per_layer_attention_json": json.dumps(entries),
        **config_with(sidecar, target_layers=targets),
    }
    tensors = [replace(t, name=t.name.replace(f"blk.{last}.", f"blk.{new}.")) for t in sidecar.tensors.values()]
    return edited(sidecar, path, edits, tensors)


def test_a_base_that_cannot_be_read_is_no_finding(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "base.gguf").write_bytes(b"GGUF")
    for name in ("nowhere.gguf", "base.gguf"):
        with pytest.raises(LlamamemError, match=name) as caught:
            validate_sidecar(exported, tmp_path / name)
        assert caught.value.reason is None


# the list of reasons


def test_the_reasons_are_those_of_the_docs() -> None:
    page = (ROOT / "docs/sidecar.md").read_text(encoding="utf-8")
    tables = re.findall(r"\| reason \| when \|\n\| --- \| --- \|\n((?:\|.*\n)+)", page)
    cells = [line.split("|")[1] for table in tables for line in table.splitlines()]
    codes = [code for cell in cells for code in re.findall("`(.+?)`", cell)]
    assert list(dict.fromkeys(codes)) == list(REASONS)
    assert all(re.fullmatch("[a-z0-9]+(-[a-z0-9]+)*", code) for code in REASONS) and all(REASONS.values())


def test_the_reasons_are_those_of_the_runtime() -> None:
    sources = [
        p for what in ("config", "gguf", "sidecar") for p in (ROOT / "patches/src").glob(f"llama-adapter-mem-{what}*")
    ]
    said = r'(?:llama_adapter_mem_fail\(\s*|reason = )"([a-z0-9-]+)"|\bfail\([^;]*, "([a-z0-9-]+)"\);'
    codes = {code for p in sources for pair in re.findall(said, p.read_text()) for code in pair if code}
    # a shard that is missing is llama.cpp's own to refuse, when it loads the weights
    assert codes == REASONS.keys() - {"base-split"}
