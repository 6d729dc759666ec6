"""Both kinds of memory on five architectures: recorded logits and states, and the same operations on each."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from model_fixtures import NAMES
from native_runs import fixture_reports, logits

from llamamem.errors import LlamamemError
from llamamem.formats.base import file_sha256
from llamamem.formats.sidecar.export import export_sidecar
from llamamem.native.build import find_build

pytestmark = pytest.mark.native

Tensors = dict[str, np.ndarray]


@pytest.mark.parametrize("name", NAMES)
def test_recorded_logits_and_states(exact: Any, models: dict[str, Path], name: str) -> None:
    """Every token at -ub 1, 7 and 512; on the memory of another text whose KV cache was dropped; frozen."""
    reports = exact(fixture_reports, models[name])
    assert reports and all(report.ok for report in reports), [report for report in reports if not report.ok]
    assert not any(report.argmax_differences for report in reports)
    assert {engine for report in reports for engine in [report.engine]} >= {f"native, -ub {n}" for n in (1, 7, 512)}


@pytest.mark.parametrize("program", ["test-memory-adapter", "test-adapter-mem-state"])
@pytest.mark.parametrize("name", ["qwen3_delta", "gemma3_rwkv_ms"], ids=["plain KV cache", "sliding window"])
def test_sequences_and_states(models: dict[str, Path], tmp_path: Path, name: str, program: str) -> None:
    """What ctest runs on Gemma 4: removal, copies, several sequences, aborted batches, saved and damaged states."""
    base, sidecar = exported(models[name], tmp_path)
    done = subprocess.run(
        [find_build().bin_dir.parent / "tests" / program, base, sidecar],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_fused_projection(product: Any, models: dict[str, Path], tmp_path: Path) -> None:
    """A file with q, k and v in one tensor gets their deltas in one product."""
    base, sidecar = exported(models["qwen3_delta_msw"], tmp_path)
    ids = np.arange(40, dtype=np.int32) * 7 % 250

    def fuse(tensors: Tensors) -> Tensors:
        res = {
            name: data for name, data in tensors.items() if not name.endswith(("_q.weight", "_k.weight", "_v.weight"))
        }
        for i in range(sum(name.endswith("attn_q.weight") for name in tensors)):
            parts = [tensors[f"blk.{i}.attn_{x}.weight"] for x in "qkv"]
            res[f"blk.{i}.attn_qkv.weight"] = np.concatenate(parts)
        return res

    fused = rewritten(base, tmp_path / "fused.gguf", "qwen3", fuse)
    memory = tmp_path / "fused-memory.gguf"
    hashes = [file_sha256(path).encode() for path in (base, fused)]
    memory.write_bytes(sidecar.read_bytes().replace(*hashes))
    expected, without = product(logits, base, sidecar, ids), product(logits, base, None, ids)
    assert np.abs(product(logits, fused, memory, ids) - expected).max() <= 2e-5
    assert np.abs(without - expected).max() >= 0.1


def test_an_architecture_that_nobody_tested(product: Any, models: dict[str, Path], tmp_path: Path) -> None:
    """It is refused by name; who asks for it gets what the same weights give where they are tested."""
    base, sidecar = exported(models["llama_rwkv_ms"], tmp_path)
    ids = np.arange(40, dtype=np.int32) * 7 % 250

    def untie(tensors: Tensors) -> Tensors:
        return tensors | {"output.weight": tensors["token_embd.weight"]}

    other, memory = rewritten(base, tmp_path / "xverse.gguf", "xverse", untie), tmp_path / "xverse-memory.gguf"
    export_sidecar(models["llama_rwkv_ms"], other, memory, row_order="norm")
    with pytest.raises(LlamamemError, match=r"\[base-untested\].*'xverse'.*--memory-untested"):
        product(logits, other, memory, ids)
    got = product(logits, other, memory, ids, untested=True)
    assert np.abs(got - product(logits, base, sidecar, ids)).max() <= 2e-5


def test_a_base_without_a_norm_before_attention(product: Any, models: dict[str, Path], tmp_path: Path) -> None:
    """OLMo 2 norms what a branch gives: what enters the first attention are the embeddings, of all tokens."""
    base, _ = exported(models["llama_rwkv_ms"], tmp_path)
    ids = np.arange(40, dtype=np.int32) * 7 % 250

    def norm_after(tensors: Tensors) -> Tensors:
        after = {".attn_norm.": ".post_attention_norm.", ".ffn_norm.": ".post_ffw_norm."}
        res = {"output.weight": tensors["token_embd.weight"]}
        for name, data in tensors.items():
            for was, now in after.items():
                name = name.replace(was, now)
            res[name] = data
            if name.endswith(("attn_q.weight", "attn_k.weight")):
                res[name.replace(".weight", "_norm.weight")] = np.ones(len(data), np.float32)
        return res

    other, memory = rewritten(base, tmp_path / "olmo2.gguf", "olmo2", norm_after), tmp_path / "olmo2-memory.gguf"
    export_sidecar(models["llama_rwkv_ms"], other, memory)
    got = product(logits, other, memory, ids, untested=True)
    assert np.abs(got - product(logits, other, None, ids)).max() >= 0.1


def exported(folder: Path, to: Path) -> tuple[Path, Path]:
    """The base of a fixture, and its adapter as a sidecar."""
    base, sidecar = folder / "model-f32.gguf", to / "memory.gguf"
    export_sidecar(folder, base, sidecar)
    return base, sidecar


def rewritten(source: Path, made: Path, arch: str, change: Callable[[Tensors], Tensors]) -> Path:
    """A copy of an F32 file with another architecture, and other tensors."""
    reader = gguf.GGUFReader(source)
    was = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(made, arch)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        name = arch + name.removeprefix(was) if name.startswith(f"{was}.") else name
        kind, *inner = field.types
        writer.add_key_value(name, field.contents(), kind, *inner)
    tensors = {tensor.name: tensor.data.reshape(tensor.shape[::-1]) for tensor in reader.tensors}
    for name, data in change(tensors).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return made
