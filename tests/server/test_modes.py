"""Profiles against each other, what the runtime refuses whoever starts it, and what it says of itself."""

from __future__ import annotations

import hashlib
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from server_runs import Serve, generate, generate_clear, random_prompt

from llamamem.native.build import Build
from llamamem.serving.preflight import file_sha256

NEAR_TIE = 0.05  # log-probability; -ub 1 and -ub 512 differ by less than 0.01 on this model


def test_eight_requests_at_once_give_one_answer_and_it_is_the_serial_one(serve: Serve) -> None:
    serial = serve("serial")
    clear: list[tuple[list[int], list[int]]] = []
    for seed in range(100, 180):
        prompt = random_prompt(seed, 40)
        tokens, margin = generate_clear(serial.client, prompt, 8)
        if margin > NEAR_TIE:
            clear.append((prompt, tokens))
        if len(clear) == 4:
            break
    assert len(clear) == 4, "too few prompts without near-ties: generate shorter answers"
    serial.server.stop()

    batched = serve("batched", parallel=4, ctx_size=4096)
    for prompt, expected in clear:
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _, p=prompt: generate_clear(batched.client, p, 8)[0], range(8)))
        assert answers == [expected] * 8


def test_different_requests_at_once_do_not_touch_each_other(serve: Serve) -> None:
    fused = serve("fused")
    prompts = [random_prompt(seed, 20 + 7 * seed) for seed in range(16)]
    alone = [generate_clear(fused.client, prompt, 8, cache_prompt=False) for prompt in prompts]
    fused.server.stop()
    batched = serve("batched", parallel=4, ctx_size=4096)
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda prompt: generate_clear(batched.client, prompt, 8)[0], prompts))
    compared = [i for i, (_, margin) in enumerate(alone) if margin > NEAR_TIE]
    assert len(compared) >= 3
    for i in compared:
        assert together[i] == alone[i][0], f"prompt {i}"


@pytest.mark.parametrize(
    "mode, flags, said",
    [
        ("serial", ["-ub", "8", "-np", "1"], "ubatch"),
        ("serial", ["-ub", "1", "-np", "2"], "seq"),
        ("fused", ["-np", "2"], "seq"),
    ],
)
def test_the_runtime_refuses_a_context_outside_its_mode(
    build: Build, model: Path, sidecar: Path, mode: str, flags: list[str], said: str
) -> None:
    command = [f"{build.bin_dir}/llama-server", "-m", str(model), "--port", "0", "-c", "512", "--no-warmup"]
    memory = ["--rwkv-ms-sidecar", str(sidecar), "--rwkv-ms-mode", mode]
    done = subprocess.run([*command, *memory, *flags], capture_output=True, text=True, timeout=60)
    assert done.returncode not in (0, -6, -11)
    reason = [line for line in (done.stdout + done.stderr).splitlines() if mode in line and said in line]
    assert reason, f"no line names {mode} and {said}:\n{done.stdout}{done.stderr}"


def test_the_default_mode_is_serial(build: Build, model: Path, sidecar: Path) -> None:
    command = [f"{build.bin_dir}/llama-server", "-m", str(model), "--port", "0", "-c", "512", "--no-warmup"]
    done = subprocess.run(
        [*command, "--rwkv-ms-sidecar", str(sidecar)], capture_output=True, text=True, timeout=60
    )  # llama-server's own defaults: several slots, -ub 512
    assert done.returncode not in (0, -6, -11) and "serial" in done.stdout + done.stderr


@pytest.mark.parametrize("profile", ["serial", "fused", "batched"])
def test_props_and_slots_say_what_memory_is_live(serve: Serve, model: Path, sidecar: Path, profile: str) -> None:
    running = serve(profile)
    memory = running.client.props()["rwkv_ms"]
    assert memory["sidecar_sha256"] == file_sha256(sidecar) and memory["base_sha256"] == file_sha256(model)
    assert re.fullmatch(r"[0-9a-f]{64}", memory["fingerprint"])
    assert memory["mode"] == profile and memory["semantics"] == 1
    layers, chunk, states = memory["layers"], memory["chunk"], memory["states"]
    assert layers and memory["rank"] > 0 and states > 0 and memory["state_heads"] > 0

    slots = running.client.slots()
    assert len(slots) == (4 if profile == "batched" else 1)
    for slot in slots:
        empty = {"tokens_written": 0, "current_state": 0, "norms": [0.0] * len(layers)}
        nobodys = {"origin": None, "given": False, "n_text": 0, "text": hashlib.sha256(b"").hexdigest()}
        assert slot["rwkv_ms"] == {**empty, **nobodys, "frozen": False, "scale": 1.0}
    generate(running.client, random_prompt(1, chunk + 5 if chunk < 500 else 50), 2, id_slot=0)
    state = running.client.slots()[0]["rwkv_ms"]
    n = (chunk + 5 if chunk < 500 else 50) + 1
    assert state["tokens_written"] == n and state["current_state"] == n // chunk % states
    assert all(norm > 0 for norm in state["norms"])


def test_a_base_only_server_has_neither(serve: Serve, build: Build) -> None:
    running = serve("base")
    props = running.client.props()
    assert "rwkv_ms" not in props and props["llamamem_build"] == build.identity
    assert all("rwkv_ms" not in slot for slot in running.client.slots())
    assert "memory: memory active" not in running.log


@pytest.mark.parametrize("profile", ["serial", "fused", "batched"])
def test_the_log_says_that_memory_is_active(serve: Serve, model: Path, sidecar: Path, profile: str) -> None:
    lines = re.findall(r"memory: memory active: (.*)", serve(profile).log)
    assert len(lines) == 1
    assert f"mode={profile}" in lines[0] and "semantics=1" in lines[0]
    assert f"sidecar={file_sha256(sidecar)}" in lines[0] and f"base={file_sha256(model)}" in lines[0]


def test_the_serial_log_carries_the_evidence_of_every_constraint(serve: Serve, tmp_path: Path) -> None:
    running = serve("serial")
    for line in (
        "one slot",
        "prompt cache off",
        "context checkpoints off",
        "warm-up skipped",
        f"slot save/restore enabled: {tmp_path}",
        "exact-prefix reuse",
    ):
        assert running.log.count(f"memory: {line}") == 1, line


def test_the_version_names_the_build(build: Build) -> None:
    done = subprocess.run([f"{build.bin_dir}/llama-server", "--version"], capture_output=True, text=True)
    assert f"llamamem: {build.identity}" in (done.stdout + done.stderr).splitlines()
