"""The matched comparison of both kinds, and what each starts from."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs llamamem[reference]")
pytest.importorskip("transformers", reason="needs llamamem[reference]")

from llamamem.errors import LlamamemError  # noqa: E402
from llamamem.lab import kinds  # noqa: E402
from llamamem.reference import demo_base  # noqa: E402
from llamamem.reference.base import load_base  # noqa: E402
from llamamem.reference.train_data import Stage  # noqa: E402
from llamamem.reference.train_run import Request, trainer_of  # noqa: E402
from llamamem.reference.trainable import AdapterSpec, new_adapter, trained_values  # noqa: E402


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    demo_base.save_base(demo_base.new_base(0), folder)
    return folder


@pytest.fixture
def plan(base: Path) -> kinds.Plan:
    return kinds.Plan(Request(base=base, stages=(Stage(1, 9, 2, 2),)), seeds=(0, 1), episodes=16)


def test_both_kinds_have_the_same_number_of_trained_values(plan: kinds.Plan) -> None:
    requests = plan.requests()
    counts = [trained_values(trainer_of(request).handle.adapter) for request in requests.values()]
    assert list(requests) == ["rwkv_ms", "delta_rule"] and abs(counts[0] / counts[1] - 1) < 0.01
    plain = trained_values(trainer_of(replace(plan.request, memory="rwkv_ms")).handle.adapter)
    assert abs(plain / counts[1] - 1) > 0.05  # or there would have been nothing to match


def test_a_run_is_a_line_and_is_not_run_again(plan: kinds.Plan, tmp_path: Path) -> None:
    said: list[str] = []
    lines = kinds.compare(plan, tmp_path / "runs.jsonl", said.append)
    assert [(line.kind, line.seed) for line in lines] == [(kind, seed) for kind in kinds.KINDS for seed in (0, 1)]
    # without a memory both are the base, on the same episodes
    assert (
        lines[0].loss_none == pytest.approx(lines[2].loss_none, abs=1e-6) and lines[0].loss_none != lines[1].loss_none
    )
    assert {line.state_floats for line in lines} == {264, 64} and {line.steps for line in lines} == {2}
    again: list[str] = []
    assert kinds.compare(plan, tmp_path / "runs.jsonl", again.append) == lines and not again
    more = replace(plan, seeds=(0, 1, 2))
    assert len(kinds.compare(more, tmp_path / "runs.jsonl", again.append)) == 6 and len(again) == 2
    other = replace(plan, request=replace(plan.request, lr=1e-3))
    assert other.key != plan.key
    (tmp_path / "runs.jsonl").write_text("{}")
    with pytest.raises(LlamamemError, match="no file of this comparison"):
        kinds.compare(plan, tmp_path / "runs.jsonl")


def test_the_table_has_means_intervals_and_the_paired_difference(plan: kinds.Plan) -> None:
    def line(kind: str, seed: int, recall: float) -> kinds.Line:
        return kinds.Line(plan.key, kind, seed, 2, 100, 64, recall, 0.04, 1 - recall, 3.0)

    lines = [line("rwkv_ms", 0, 0.5), line("rwkv_ms", 1, 0.7), line("delta_rule", 0, 0.4), line("delta_rule", 1, 0.6)]
    text = kinds.table(plan, lines).markdown()
    assert "| rwkv_ms | 100 | 64 | 0.600 ± 1.271 |" in text
    assert "| difference |  |  | +0.100 ± 0.000 |  | -0.100 ± 0.000 |" in text


def test_the_command(llamamem: Callable[..., Any], base: Path, tmp_path: Path) -> None:
    given = ("train", "--compare", "--base", base, "--output", tmp_path / "a")
    small = ("--steps", "5", "--batch", "1", "--seeds", "2", "--episodes", "16", "--start", "original")
    done = llamamem(*given, *small, "--json")
    assert done.status == 0, done.err
    assert [run["kind"] for run in json.loads(done.out)["runs"]] == ["rwkv_ms"] * 2 + ["delta_rule"] * 2
    assert "difference" in (tmp_path / "a" / "report.md").read_text()
    assert "started as original" in llamamem(*given, *small).out
    assert llamamem(*given, "--smoke").status == 2 and llamamem(*given[:4]).status == 2


@pytest.mark.parametrize("memory", ["rwkv_ms", "delta_rule"])
def test_the_originals_start(base: Path, memory: str) -> None:
    """Deltas are columns of the base's projections, normalised; gates are shut alike for all inputs."""
    model = load_base(base).model
    adapter = new_adapter(AdapterSpec(memory=memory, start="original", layers=()), model, 0)
    assert len(adapter.layers) == len(model.model.layers) and adapter.config["output_init"] == "base_slice_fixed"
    layer, first = adapter.layers[2], model.model.layers[2].self_attn.q_proj.weight[:, 0]
    torch.testing.assert_close(layer.delta_q_proj[:, 0], 0.05 * first / first.norm())
    assert not layer.beta_proj.any() and (layer.beta_bias == -1.5).all() and not layer.delta_k_proj.any()
    assert layer.memory_q_proj.abs().max() <= layer.shape.hidden**-0.5
