"""No request ends a server or changes what others get: bodies that were drawn, and those that did it once.

tools/hostile_requests.py draws more of them, and runs against a build with sanitizers.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_runs import ServeDemo

TOOL = Path(__file__).resolve().parents[2] / "tools" / "hostile_requests.py"
BODIES = int(os.environ.get("LLAMAMEM_HOSTILE_BODIES", "400"))

ROUTES = ["/completion", "/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages", "/infill"]
ROUTES += ["/tokenize", "/apply-template", "/embeddings", "/rerank", "/v1/messages/count_tokens", "/lora-adapters"]
ACTIONS = ["memory-save", "memory-restore", "memory-reset", "memory-set", "save", "restore", "erase"]


@pytest.mark.parametrize("profile", ["batched", "batched-unified"])
def test_bodies_that_were_drawn(profile: str, build: Any) -> None:
    binary = Path(build.bin_dir) / "llama-server"
    command = [sys.executable, str(TOOL), "--bodies", str(BODIES), "--profile", profile, "--server", str(binary)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]


def test_deep_json_is_refused_by_every_route(serve_demo: ServeDemo) -> None:
    url = str(serve_demo("batched", parallel=2).client.url).rstrip("/")
    paths = [*ROUTES, *(f"/slots/0?action={action}" for action in ACTIONS)]
    with httpx.Client(base_url=url, timeout=60) as client:
        for path in paths:
            for left, right in (("[", "]"), ('{"a":', "}")):
                body = '{"rwkv_ms":' + left * 400_000 + "1" + right * 400_000 + "}"
                answer = client.post(path, content=body)
                said = answer.json()["error"]["message"]
                assert (answer.status_code, "\n" in said) == (400, False) and "nested 400001 deep" in said, path
        # what is in a string is text; 256 are read, whatever comes of it
        answer = client.post("/tokenize", json={"content": "[" * 5000 + '\\"{' * 1000})
        assert answer.status_code == 200
        deep = '{"content":"a","x":' + "[" * 255 + "]" * 255 + "}"
        assert client.post("/tokenize", content=deep).status_code == 200
        assert client.post("/tokenize", content=deep.replace('"x":', '"x":[')).status_code == 400  # no JSON, and deeper
        assert client.get("/health").json() == {"status": "ok"}


def test_what_is_no_file_in_the_slot_directory(serve_demo: ServeDemo, tmp_path: Path) -> None:
    slots = tmp_path / "slots"
    slots.mkdir()
    running = serve_demo("batched", parallel=2, slot_dir=slots)
    os.mkfifo(slots / "pipe")
    (slots / "device").symlink_to("/dev/zero")
    (slots / "directory").mkdir()
    (slots / "sparse").touch()
    os.truncate(slots / "sparse", 2 << 30)
    url = str(running.client.url).rstrip("/")
    with httpx.Client(base_url=url, timeout=20) as client:
        for action in ("memory-restore", "restore"):
            for name in ("pipe", "device", "directory", "sparse"):
                began = time.monotonic()
                answer = client.post(f"/slots/0?action={action}", json={"filename": name})
                reason = "[state-format]" if name == "sparse" else "[state-unreadable]"
                assert answer.status_code == 400 and reason in answer.json()["error"]["message"]
                assert time.monotonic() - began < 5
        for action in ("memory-save", "save"):
            assert client.post(f"/slots/0?action={action}", json={"filename": "directory"}).status_code in (400, 500)
            # not into the pipe, but in its place
            answer = client.post(f"/slots/0?action={action}", json={"filename": f"{action}.bin"})
            assert answer.status_code == 200
            assert (slots / f"{action}.bin").stat().st_mode & 0o777 == 0o600
    assert not [path for path in slots.iterdir() if path.name.endswith(".part")]
