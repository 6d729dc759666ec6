"""Recall across a dropped KV cache on a real server, in small; `llamamem recall` is the whole of it."""

from __future__ import annotations

import json
import subprocess
import sys

LLAMAMEM = [sys.executable, "-m", "llamamem.cli"]


def test_the_demo_model_recalls_with_its_memory_alone() -> None:
    command = [*LLAMAMEM, "recall", "--rows", "4:64,8:64,4:500", "--episodes", "5", "--seed", "3", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr + done.stdout
    report = json.loads(done.stdout)
    assert report["ok"] and report["memory_bytes"] < 10_000
    for row in report["rows"]:
        assert row["memory"] > 0.75 > 0.3 > max(row["none"], row["foreign"])
