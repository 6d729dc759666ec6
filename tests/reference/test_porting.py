"""What docs/porting.md has for a base that is not among the tested ones."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs llamamem[reference]")
pytest.importorskip("transformers", reason="needs llamamem[reference]")

from llamamem.formats.base import ROWS

TOOLS = Path(__file__).parents[2] / "tools"


def said(*command: str | Path) -> tuple[int, str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=600, check=False, env=environment
    )
    return done.returncode, done.stdout + done.stderr


def check(folder: Path, *options: str) -> tuple[int, str]:
    return said("-m", "llamamem", "fixture", "check", folder, "--engine", "native", *options)


@pytest.mark.parametrize(
    ("model_type", "kind", "order"),
    [("starcoder2", "rwkv_ms", "hf"), ("olmo", "delta_rule", "norm"), ("phi3", "rwkv_ms", None)],
    ids=["biases", "permuted rows", "q, k and v in one"],
)
def test_another_base(tmp_path: Path, model_type: str, kind: str, order: str | None) -> None:
    """A tiny one, its fixture, the runtime against it; with the wrong order of rows it is found or refused."""
    folder = tmp_path / "tiny"
    status, text = said(TOOLS / "make_tiny_model.py", model_type, folder, "--kind", kind)
    assert status == 0, text
    status, text = said(TOOLS / "make_fixture.py", folder)
    assert status == 0, text
    status, text = check(folder, *(("--row-order", order) if order else ()))
    assert status == 0 and "18 of 18 within 5e-05 and 5e-06" in text, text
    assert (order is None) == (model_type in ROWS)
    if order == "norm":
        status, text = check(folder, "--row-order", "hf")
        assert status == 1 and "6 of 18 within" in text, text
    if order == "hf":
        status, text = check(folder, "--row-order", "norm")
        assert status == 2 and "[base-rows]" in text, text
        status, text = check(folder)
        assert status == 2 and "--row-order" in text, text


@pytest.mark.parametrize(
    ("arguments", "why"),
    [(["no_such_type"], "no_such_type"), (["cohere2"], "rotary_pct.*--set"), (["phi3", "--set", "x"], "KEY=VALUE")],
)
def test_what_is_wrong_is_named_and_nothing_is_written(tmp_path: Path, arguments: list[str], why: str) -> None:
    model_type, *rest = arguments
    status, text = said(TOOLS / "make_tiny_model.py", model_type, tmp_path / "tiny", *rest)
    assert status == 2 and re.search(why, text) and "Traceback" not in text, text
    assert not (tmp_path / "tiny").exists()
