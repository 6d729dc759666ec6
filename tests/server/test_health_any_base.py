"""A server and a smoke test on other bases than Gemma 4, with both kinds of memory."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from model_fixtures import models  # noqa: F401

from llamamem.formats.sidecar.export import export_sidecar
from llamamem.native.build import Build
from llamamem.proof.health import check_health, target_of
from llamamem.serving.client import Client
from llamamem.serving.preflight import check
from llamamem.serving.process import launch
from llamamem.serving.profiles import make_plan


@pytest.mark.parametrize(
    ("name", "profile", "kind"),
    [
        ("smollm3_delta", "batched", "delta_rule"),
        ("qwen3_delta_msw", "serial", "delta_rule"),
        ("gemma3_rwkv_ms", "fused", "rwkv_ms"),
    ],
)
def test_health_and_smoke_hold(
    build: Build,
    models: dict[str, Path],  # noqa: F811
    llamamem: Any,
    tmp_path: Path,
    name: str,
    profile: str,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    base, sidecar = models[name] / "model-f32.gguf", tmp_path / "memory.gguf"
    export_sidecar(models[name], base, sidecar)
    plan = make_plan(
        base, sidecar=sidecar, profile=profile, bin_dir=Path(build.bin_dir), port=0, ctx_size=1024,
        slot_dir=tmp_path / "slots", extra=["--threads", "1"], environ={},
    )  # fmt: skip
    with ExitStack() as stack:
        server = stack.enter_context(launch(plan, check(plan), build=build.identity))
        server.wait_ready(stall_timeout=60)
        client = stack.enter_context(Client(server.url, timeout=120))
        assert client.props()["memory_adapter"]["kind"] == kind
        report = check_health(target_of(server.record), timeout=120)
        assert report.ok, [found for found in report.checks if not found.ok]
    done = llamamem("smoke", "--model", base, "--sidecar", sidecar, "-n", "24", "--ctx-size", "512")
    assert done.status == 0, done.out + done.err
