"""A server with a key: every command that is asked without it says which option brings it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from server_runs import Serve

LLAMAMEM = [sys.executable, "-m", "llamamem.cli"]
SUITE = Path(__file__).resolve().parents[2] / "configs" / "suites" / "memory.jsonl"
KEY = "a-key-that-nobody-guesses"


def run(*arguments: object, status: int = 2, said: str = "") -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*LLAMAMEM, *map(str, arguments)], capture_output=True, text=True, timeout=120, input="hi\n")
    assert done.returncode == status, done.stdout + done.stderr
    assert said in done.stdout + done.stderr and KEY not in done.stdout + done.stderr
    return done


def test_a_key_that_is_missing_or_wrong_is_asked_for(serve: Serve, tmp_path: Path) -> None:
    url = serve("fused", "--api-key", KEY).client.url
    store = ("--store", tmp_path / "sessions")
    run("session", "start", "anna", *store, status=0)
    commands = [
        (2, "health"),
        (0, "health", "--probe"),  # ready, which it says to everybody
        (2, "chat", "--max-tokens", "4", *store),
        (2, "eval", SUITE, "--limit", "1", "--max-tokens", "4"),
        (2, "session", "resume", "anna", "--slot", "0", *store),
        (2, "session", "save", "anna", "--slot", "0", *store),
    ]
    for status, *command in commands:
        for wrong in ((), ("--api-key", "another")):
            done = run(*command, "--url", url, *wrong, status=status, said="--api-key")
            if status == 2:
                assert done.stderr.count("\n") == 1, done.stderr
    run("health", "--probe", "--url", url, "--api-key", KEY, status=0)
    run("session", "resume", "anna", "--slot", "0", "--url", f"{url}/v1", "--api-key", KEY, *store, status=0)
