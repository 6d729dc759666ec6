"""Sidecars of version 3: every kind and base, from a checkpoint and back, and what is refused on the way."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from llamamem.errors import LlamamemError
from llamamem.formats.checkpoint import read_checkpoint
from llamamem.formats.checkpoint.writer import materialize, write_checkpoint
from llamamem.formats.gguf_file import GgufTensor
from llamamem.formats.sidecar import read_sidecar, validate_sidecar, values
from llamamem.formats.sidecar.compare import compare
from llamamem.formats.sidecar.config import INERT
from llamamem.formats.sidecar.copy import rebind_sidecar, zero_sidecar
from llamamem.formats.sidecar.export import export_sidecar
from llamamem.formats.sidecar.inspect import inspect_sidecar
from llamamem.formats.sidecar.rows import to_hf, to_norm

BASE = "model-f32.gguf"
CASES = {
    "qwen3_delta": ("delta_rule", "qwen3", 0),
    "qwen3_delta_msw": ("delta_rule", "qwen3", 0),
    "smollm3_delta": ("delta_rule", "smollm3", 16),
    "llama_rwkv_ms": ("rwkv_ms", "llama", 16),
    "qwen3_rwkv_ms": ("rwkv_ms", "qwen3", 0),
    "qwen3_rwkv_ms delta_mem_config_v2.json": ("rwkv_ms", "qwen3", 0),
    "gemma3_rwkv_ms": ("rwkv_ms", "gemma3", 0),
}


@pytest.fixture(scope="session")
def sidecars(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sidecar of each case. Not to be changed."""
    folder = tmp_path_factory.mktemp("version-3")
    made = {}
    for i, case in enumerate(CASES):
        name, _, config = case.partition(" ")
        made[case] = folder / f"{i}.gguf"
        export_sidecar(models[name], models[name] / BASE, made[case], config=config or None)
    return made


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("format", ["pt", "safetensors"])
def test_a_checkpoint_comes_back_bit_by_bit(
    case: str, format: str, models: dict[str, Path], sidecars: dict[str, Path], tmp_path: Path
) -> None:
    name, _, config = case.partition(" ")
    sidecar, (kind, arch, head_dim) = read_sidecar(sidecars[case]), CASES[case]
    assert (sidecar.format_version, sidecar.kind, sidecar.base_arch, sidecar.rope_head_dim) == (3, kind, arch, head_dim)
    assert sidecar.source_prefix == "model.layers."
    assert validate_sidecar(sidecar.path, models[name] / BASE).findings == ()

    materialize(sidecar, tmp_path / "back", format=format)
    before, after = read_checkpoint(models[name], config or None), read_checkpoint(tmp_path / "back")
    assert after.tensors == before.tensors
    assert json.dumps(after.config) == json.dumps(before.config)
    files = {f"delta_mem_adapter.{format}", "delta_mem_config.json"}
    if (models[name] / "adapter_metadata.json").exists():
        assert after.metadata == before.metadata
        files.add("adapter_metadata.json")
    assert {path.name for path in (tmp_path / "back").iterdir()} == files
    comparison = compare(sidecars[case], models[name], config=config or None)
    assert comparison.same and comparison.compared == len(before.tensors)


@pytest.mark.parametrize("name", ["smollm3_delta", "llama_rwkv_ms"])
def test_rows_of_q_and_k_are_permuted_on_every_layer(
    name: str, models: dict[str, Path], sidecars: dict[str, Path]
) -> None:
    sidecar, source = read_sidecar(sidecars[name]), read_checkpoint(models[name])
    for layer in sidecar.layers:
        for head in "qkvo":
            given = values(source.tensors[f"model.layers.{layer.layer}.self_attn.delta_{head}_proj"])
            kept = values(sidecar.tensors[f"blk.{layer.layer}.delta_{head}"])
            want = given.reshape(-1, 2, 8, 8).swapaxes(1, 2).reshape(given.shape) if head in "qk" else given
            assert np.array_equal(kept, want), f"layer {layer.layer}, {head}"
            assert (head in "qk") != np.array_equal(kept, given)


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_the_order_of_rows_by_hand(dtype: str) -> None:
    size = {"BF16": 2, "F32": 4}[dtype]
    rows = [bytes([n]) * size for n in range(8)]
    tensor = GgufTensor("x", dtype, (8, 1), b"".join(rows))
    # two heads of 4: HF's row j d/2 + i is row 2 i + j
    assert to_norm(tensor, 4).data == b"".join(rows[i] for i in (0, 2, 1, 3, 4, 6, 5, 7))
    assert to_hf(to_norm(tensor, 4), 4) == tensor


def test_zeros_of_heads_that_are_not_active_are_left_out(models: dict[str, Path], sidecars: dict[str, Path]) -> None:
    sidecar = read_sidecar(sidecars["qwen3_delta"])
    assert {name.rpartition(".")[2] for name in sidecar.tensors} == {
        *("mem_q", "mem_k", "mem_v", "beta", "beta_b", "delta_q", "delta_o")
    }
    assert len(sidecar.tensors) == 4 * 7
    assert len(json.loads(sidecar.get("omitted_tensors_json"))) == 4 * 2


def test_what_people_see(sidecars: dict[str, Path]) -> None:
    rows = dict(inspect_sidecar(sidecars["smollm3_delta"]).summary())
    assert rows["architecture"] == "smollm3"
    assert rows["memory"] == "delta_rule, rank 8, alpha 16, state heads 1"
    assert rows["  rows"] == "of delta_q and delta_k permuted in heads of 16"
    assert "  chunk" not in rows and rows["format"] == "version 3, memory_adapter_gguf_sidecar.v3"
    assert "states 4" in dict(inspect_sidecar(sidecars["llama_rwkv_ms"]).summary())["memory"]


def test_a_copy_for_another_quantisation_and_one_of_zeros(
    models: dict[str, Path], sidecars: dict[str, Path], tmp_path: Path
) -> None:
    base = models["smollm3_delta"] / BASE
    other = tmp_path / "other.gguf"
    other.write_bytes(base.read_bytes() + b"\0")
    sidecar, warnings = rebind_sidecar(sidecars["smollm3_delta"], other, tmp_path / "rebound.gguf")
    assert sidecar.base_sha256 == hashlib.sha256(other.read_bytes()).hexdigest() and not warnings
    assert compare(tmp_path / "rebound.gguf", sidecars["smollm3_delta"]).same
    with pytest.raises(LlamamemError, match="architecture is 'qwen3', the sidecar is for 'smollm3'") as e:
        rebind_sidecar(sidecars["smollm3_delta"], models["qwen3_delta"] / BASE, tmp_path / "x.gguf")
    assert e.value.reason == "base-architecture" and not (tmp_path / "x.gguf").exists()

    zeroed = zero_sidecar(sidecars["smollm3_delta"], tmp_path / "zero.gguf")
    for name, tensor in zeroed.tensors.items():
        assert (".delta_" in name) != any(tensor.data)


def copied(models: dict[str, Path], name: str, folder: Path, **config: Any) -> Path:
    """A copy of a checkpoint with other members of its config."""
    source = read_checkpoint(models[name])
    write_checkpoint(folder, source.tensors.values(), source.config | config, None)
    return folder


def test_an_old_config_may_lack_every_member(models: dict[str, Path], tmp_path: Path) -> None:
    source = read_checkpoint(models["smollm3_delta"])
    write_checkpoint(tmp_path / "old", source.tensors.values(), {}, None)
    sidecar = export_sidecar(tmp_path / "old", models["smollm3_delta"] / BASE, tmp_path / "old.gguf")
    assert (sidecar.rank, sidecar.delta_heads, len(sidecar.layers)) == (8, ("q", "k", "v", "o"), 8)
    assert sidecar.config == {}
    # of absent members only those have no meaning that training alone reads
    found = {difference.member for difference in compare(tmp_path / "old.gguf", models["smollm3_delta"]).config}
    assert found <= {*INERT[float], *INERT[str], "delta_scale_init"}


@pytest.mark.parametrize("mode", ["message_mean", "sentence_mean"])
def test_writes_of_a_whole_message_are_refused_with_a_reason(
    mode: str, models: dict[str, Path], tmp_path: Path
) -> None:
    folder = copied(models, "qwen3_delta", tmp_path / "x", memory_write_granularity=mode)
    with pytest.raises(LlamamemError, match=f'memory_write_granularity is "{mode}".* mean of its tokens') as e:
        export_sidecar(folder, models["qwen3_delta"] / BASE, tmp_path / "x.gguf")
    assert e.value.reason == "config-unsupported" and len(str(e.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "config", "reason"),
    [
        ("qwen3_delta", {"memory_backend": "hrm"}, "config-unsupported"),
        ("qwen3_delta", {"num_memory_partitions": 4}, "config-unsupported"),
        ("qwen3_delta", {"trainable_delta_scale": True}, "tensor-missing"),
        ("qwen3_delta", {"delta_o_rmsnorm": True}, "tensor-missing"),
        ("qwen3_delta", {"couple_lambda": False}, "tensor-missing"),
        ("qwen3_delta_msw", {"couple_lambda": True}, "tensor-unknown"),
        ("qwen3_delta_msw", {"delta_heads": ["q", "o"]}, "tensor-inactive"),
        ("qwen3_delta_msw", {"num_state_heads": 1}, "tensor-shape"),
        ("qwen3_delta", {"target_layers": [0, 1, 2]}, "tensor-unknown"),
        ("qwen3_delta", {"target_layers": [0, 1, 2, 9]}, None),
        ("qwen3_delta", {"extra": 1}, "config-unknown"),
    ],
)
def test_what_a_config_asks_for(
    name: str, config: dict[str, Any], reason: str | None, models: dict[str, Path], tmp_path: Path
) -> None:
    folder = copied(models, name, tmp_path / "x", **config)
    with pytest.raises(LlamamemError) as e:
        export_sidecar(folder, models[name] / BASE, tmp_path / "x.gguf")
    assert e.value.reason == reason and len(str(e.value).splitlines()) == 1
    assert not (tmp_path / "x.gguf").exists()


def test_no_heads_at_all(models: dict[str, Path], tmp_path: Path) -> None:
    source = read_checkpoint(models["qwen3_delta"])
    tensors = [replace(t, data=bytes(len(t.data))) if "delta_" in t.name else t for t in source.tensors.values()]
    write_checkpoint(tmp_path / "none", tensors, source.config | {"delta_heads": []}, None)
    sidecar = export_sidecar(tmp_path / "none", models["qwen3_delta"] / BASE, tmp_path / "none.gguf")
    assert sidecar.delta_heads == () and not any("delta_" in name for name in sidecar.tensors)
    materialize(sidecar, tmp_path / "back")
    assert read_checkpoint(tmp_path / "back").tensors == {t.name: t for t in tensors}


@pytest.mark.parametrize(
    ("tail", "shape"),
    [("beta_bias", (1,)), ("beta_proj", (1, 64)), ("delta_q_proj", (1, 8)), ("memory_k_proj", (8, 1))],
)
def test_a_shape_that_could_be_broadcast(
    tail: str, shape: tuple[int, ...], models: dict[str, Path], tmp_path: Path
) -> None:
    source = read_checkpoint(models["qwen3_delta"])
    name = f"model.layers.2.self_attn.{tail}"
    wrong = replace(source.tensors[name], shape=shape, data=source.tensors[name].data[: 2 * int(np.prod(shape))])
    write_checkpoint(tmp_path / "x", (source.tensors | {name: wrong}).values(), source.config, None)
    with pytest.raises(LlamamemError, match=r"has shape \[") as e:
        export_sidecar(tmp_path / "x", models["qwen3_delta"] / BASE, tmp_path / "x.gguf")
    assert e.value.reason == "tensor-shape"


def test_a_base_with_its_rows_in_another_order(
    models: dict[str, Path], sidecars: dict[str, Path], tmp_path: Path
) -> None:
    """Sidecars that say otherwise than the architecture does, whoever made them."""
    base = models["smollm3_delta"] / BASE
    raw = sidecars["smollm3_delta"].read_bytes()
    at = raw.index(b"memory_adapter.rope_head_dim") + len(b"memory_adapter.rope_head_dim") + 4
    (tmp_path / "x.gguf").write_bytes(raw[:at] + (8).to_bytes(4, "little") + raw[at + 4 :])
    found = validate_sidecar(tmp_path / "x.gguf", base).findings
    assert [f.reason for f in found] == ["base-rows"] and "heads of 8" in found[0].message


def test_an_architecture_that_is_not_in_the_list_needs_to_be_told_its_rows(model_a: Path, tmp_path: Path) -> None:
    """A base that calls itself something else, which no parity fixture has."""
    writer = gguf.GGUFWriter(tmp_path / "base.gguf", "mystery")
    for key, value in {"embedding_length": 64, "block_count": 6}.items():
        writer.add_uint32(f"mystery.{key}", value)
    writer.add_array("mystery.attention.head_count", [4] * 6)
    writer.add_array("mystery.attention.head_count_kv", [2] * 5 + [2])
    writer.add_uint32("mystery.attention.key_length", 16)
    shapes = {"attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64), "attn_output": (64, 64)}
    for layer in range(6):
        for name, shape in shapes.items():
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.zeros(shape, np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = read_checkpoint(model_a)
    config = source.config | {"target_layers": [0, 1, 2, 3, 4]}
    tensors = [t for name, t in source.tensors.items() if ".layers.5." not in name]
    write_checkpoint(tmp_path / "x", tensors, config, None)
    with pytest.raises(LlamamemError, match="architecture 'mystery'; say it with --row-order"):
        export_sidecar(tmp_path / "x", tmp_path / "base.gguf", tmp_path / "x.gguf")
    told = export_sidecar(tmp_path / "x", tmp_path / "base.gguf", tmp_path / "x.gguf", row_order="norm")
    assert (told.base_arch, told.row_order, told.rope_head_dim) == ("mystery", "norm", 16)
    assert validate_sidecar(told.path, tmp_path / "base.gguf").findings == ()
    with pytest.raises(LlamamemError, match="leave out --row-order norm"):
        export_sidecar(model_a, model_a / BASE, tmp_path / "y.gguf", row_order="norm")


def test_a_memory_of_all_layers_fits_no_deeper_model(models: dict[str, Path], sidecars: dict[str, Path]) -> None:
    found = validate_sidecar(sidecars["qwen3_delta"], models["qwen3_rwkv_ms"] / BASE).findings
    assert [f.reason for f in found] == ["base-shape", "base-hash"]
    assert "has 5 layers, the sidecar is for all of 4" in found[0].message


@pytest.mark.parametrize("text", ["[", "{}", '["x"]', '[{"source_name":"model.layers.0.self_attn.delta_q_proj"}]'])
def test_a_list_of_left_out_tensors_that_lies(text: str, sidecars: dict[str, Path], tmp_path: Path) -> None:
    sidecar = read_sidecar(sidecars["qwen3_delta"])
    key = f"{sidecar.prefix}omitted_tensors_json"
    lying = replace(sidecar, fields=sidecar.fields | {key: replace(sidecar.fields[key], value=text)})
    with pytest.raises(LlamamemError, match="omitted_tensors_json"):
        materialize(lying, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_checkpoint_of_another_layout_is_not_mixed_with_it(sidecars: dict[str, Path], tmp_path: Path) -> None:
    materialize(read_sidecar(sidecars["llama_rwkv_ms"]), tmp_path / "x")
    with pytest.raises(LlamamemError, match=r"adapter_metadata.json: is there already"):
        materialize(read_sidecar(sidecars["qwen3_delta"]), tmp_path / "x", force=True)


def test_gemma_4_keeps_version_2(model_a: Path, tmp_path: Path) -> None:
    """A delta rule on it is of version 3 all the same."""
    assert export_sidecar(model_a, model_a / BASE, tmp_path / "a.gguf").format_version == 2
    source = read_checkpoint(model_a)
    tensors = [t for name, t in source.tensors.items() if "hrm_" not in name]
    config = {key: value for key, value in source.config.items() if not key.startswith("memory_backend")}
    write_checkpoint(tmp_path / "x", tensors, config | {"delta_heads": ["q", "o"]}, None)
    with pytest.raises(LlamamemError) as e:  # model_a's idle heads are random
        export_sidecar(tmp_path / "x", model_a / BASE, tmp_path / "x.gguf")
    assert e.value.reason == "tensor-inactive"
    shutil.rmtree(tmp_path / "x")
    tensors = [t for t in tensors if not t.name.endswith(("delta_k_proj", "delta_v_proj"))]
    write_checkpoint(tmp_path / "x", tensors, config, None)
    sidecar = export_sidecar(tmp_path / "x", model_a / BASE, tmp_path / "x.gguf")
    assert (sidecar.format_version, sidecar.kind) == (3, "delta_rule")
    assert sidecar.source_prefix == "model.language_model.layers."
    assert validate_sidecar(sidecar.path, model_a / BASE).findings == ()
