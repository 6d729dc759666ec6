"""A base is swapped for another quantisation of it: named memories go along, and still answer."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from server_runs import ServeDemo

from llamamem.errors import LlamamemError
from llamamem.formats.demo_files import demo_files
from llamamem.formats.sidecar.copy import rebind_sidecar
from llamamem.formats.state import decode_state
from llamamem.native.build import Build
from llamamem.proof.recall import ask, tell
from llamamem.reference import language
from llamamem.serving.client import Client
from llamamem.serving.process import launch
from llamamem.serving.profiles import make_plan
from llamamem.sessions import open_store
from llamamem.sessions.session import Memory

LLAMAMEM = [sys.executable, "-m", "llamamem.cli"]


def test_sessions_go_along_to_another_quantisation(
    build: Build, serve_demo: ServeDemo, tmp_path: Path, own_directories: None
) -> None:
    files = demo_files()
    base, sidecar, store = tmp_path / "q4.gguf", tmp_path / "q4-memory.gguf", tmp_path / "sessions"
    program = build.bin_dir / "llama-quantize"
    subprocess.run([program, files.model, base, "Q4_0", "1"], check=True, capture_output=True, timeout=120)
    rebind_sidecar(files.sidecar, base, sidecar)

    first = serve_demo("fused")
    episode = language.episode(random.Random(4), 4, 64)
    facts = episode.facts
    _, told = tell(first.client, episode.conversation)
    first.server.stop()
    state = decode_state(told)
    opened = open_store(str(store))
    kept = Memory(told, int(state.tokens_written.max()), state.sidecar_sha256, state.base_sha256)
    opened.save(opened.create("anna"), kept)
    opened.create("nothing yet")

    moves = ["--sidecar", files.sidecar, "--base", files.model, "--to-sidecar", sidecar, "--to-base", base]
    command = [*LLAMAMEM, "session", "rebase", *map(str, moves), "--store", str(store), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["moved"], report["left"]) == (["anna"], ["nothing yet"]) and 0 < report["most"] <= 1
    session, moved = opened.load("anna")
    assert session.generation == 2 and session.tokens == kept.tokens and moved is not None

    plan = make_plan(base, sidecar=sidecar, profile="fused", port=0, ctx_size=1024, slot_dir=tmp_path,
                     bin_dir=build.bin_dir, extra=["--threads", "1"], environ={})  # fmt: skip
    with launch(plan, directory=tmp_path / "runs") as server:
        server.wait_ready(stall_timeout=60)
        with Client(server.url, timeout=120) as client:
            with pytest.raises(LlamamemError, match="state-identity"):
                ask(client, "anna", told)
            answers = {name: ask(client, name, moved) for name in facts}
            unasked = [ask(client, name, None) for name in facts]
    assert sum(answers[name] == surname for name, surname in facts.items()) >= 3, (answers, facts)
    assert sum(said == surname for said, surname in zip(unasked, facts.values(), strict=True)) <= 1

    again = subprocess.run([*command, "anna"], capture_output=True, text=True, timeout=120)
    assert again.returncode == 2 and "'anna': has no memory of" in again.stderr and again.stderr.count("\n") == 1
    opened.undo("anna")
    assert opened.load("anna")[1] == told
