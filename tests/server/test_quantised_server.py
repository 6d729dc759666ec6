"""Quantised bases as they are served: with any number of threads, and found healthy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from server_runs import generate

from llamamem.formats.sidecar.copy import rebind_sidecar
from llamamem.native.build import Build
from llamamem.proof.health import check_health, target_of
from llamamem.serving.client import Client
from llamamem.serving.preflight import check
from llamamem.serving.process import launch
from llamamem.serving.profiles import make_plan

MAKE_MODEL = Path(__file__).parents[2] / "tools" / "make_model.py"
PROMPT = [2, *range(300, 340)]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A random base whose rows are wide enough for every type, and a sidecar for it."""
    folder = tmp_path_factory.mktemp("small")
    base, sidecar = folder / "small.gguf", folder / "small-memory.gguf"
    command = [sys.executable, MAKE_MODEL, "--preset", "small", "--output", base, "--sidecar", sidecar]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return base, sidecar


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K_M"])
def test_a_quantised_base_is_served(build: Build, small: tuple[Path, Path], kind: str, tmp_path: Path) -> None:
    base, sidecar = tmp_path / "base.gguf", tmp_path / "memory.gguf"
    command = [build.bin_dir / "llama-quantize", small[0], base, kind, "1"]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    rebind_sidecar(small[1], base, sidecar)
    answers = []
    for threads, more in ((1, []), (2, []), (4, []), (1, ["--flash-attn", "off"])):
        extra = ["--threads", str(threads), *more]
        own = {"parallel": 2, "port": 0, "ctx_size": 1024, "slot_dir": tmp_path, "bin_dir": build.bin_dir}
        plan = make_plan(base, sidecar=sidecar, profile="batched", environ={}, extra=extra, **own)
        with launch(plan, check(plan), build=build.identity) as server:
            server.wait_ready(stall_timeout=60)
            with Client(server.url, timeout=120) as client:
                answer = generate(client, PROMPT, 6, n_probs=5)
                answers.append(
                    [[top["logprob"] for top in one["top_logprobs"]] for one in answer["completion_probabilities"]]
                )
            if threads == 1:
                report = check_health(target_of(server.record))
                assert report.ok, [found for found in report.checks if not found.ok]
    for other in answers[1:3]:  # the last rounds otherwise
        np.testing.assert_allclose(other, answers[0], atol=1e-3, rtol=0)
