"""`llamamem health` against the real server: it holds in each profile, and what is wrong is found where it is wrong."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from launched import until
from lying_proxy import Change, LyingProxy
from server_runs import Running, generate, random_prompt

from llamamem.formats.health import CHECK_IDS, HealthReport, health_fault
from llamamem.formats.sidecar.copy import zero_sidecar
from llamamem.native.build import Build
from llamamem.proof.health import Target, check_health, target_of
from llamamem.serving.client import Client
from llamamem.serving.preflight import check
from llamamem.serving.process import launch
from llamamem.serving.profiles import make_plan

Start = Callable[..., Running]
V2 = Path(__file__).parents[1] / "data" / "model_a" / "sidecar-v2.gguf"


@pytest.fixture
def start(build: Build, model: Path, sidecar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """`start("serial", memory=FILE, base=FILE)`: as `llamamem serve` starts a server, with every preflight check."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with ExitStack() as stack:

        def run(profile: str, *, memory: Path | None = sidecar, base: Path = model, **options: Any) -> Running:
            plan = make_plan(
                base,
                bin_dir=Path(build.bin_dir),
                sidecar=None if profile == "base" else memory,
                profile=profile,
                port=0,
                ctx_size=1024,
                slot_dir=tmp_path / "slots",
                extra=["--threads", "1"],  # two would wait for each other where others use the cores
                environ={},
                **options,
            )
            server = stack.enter_context(launch(plan, check(plan), build=build.identity))
            server.wait_ready(stall_timeout=60)
            return Running(server, stack.enter_context(Client(server.url, timeout=120)))

        yield run


def target(running: Running) -> Target:
    return target_of(running.server.record)


def failed(report: HealthReport) -> list[str]:
    assert [check.id for check in report.checks] == list(CHECK_IDS)
    return [check.id for check in report.checks if not check.ok]


@pytest.mark.parametrize(("profile", "parallel"), [("serial", 1), ("fused", 1), ("batched", 1), ("batched", 3)])
def test_each_profile_is_healthy_again_and_again(start: Start, profile: str, parallel: int) -> None:
    running = start(profile, parallel=parallel)
    for _ in range(2):
        report = check_health(target(running))
        assert failed(report) == [] and report.ok, [check for check in report.checks if not check.ok]


def test_the_command_and_the_file_that_it_writes(
    start: Start, tmp_path: Path, llamamem: Callable[..., tuple[int, str, str]]
) -> None:
    record, path = start("serial").server.record, tmp_path / "health.json"
    status, out, err = llamamem("health", "--json", "--output", path)
    assert (status, err) == (0, ""), out
    assert health_fault(path, record, max_age=timedelta(minutes=5)) is None
    other = start("fused").server.record
    assert "another server" in (health_fault(path, other, max_age=timedelta(minutes=5)) or "")
    assert llamamem("health")[0] == 2  # two servers run, and none was named
    assert llamamem("health", "--run", other.run_id)[0] == 0


@pytest.mark.parametrize("profile", ["serial", "batched"])
def test_the_slot_goes_on_as_if_nobody_had_looked(start: Start, tmp_path: Path, profile: str) -> None:
    running = start(profile, parallel=1)
    client, first, more = running.client, random_prompt(1, 60), random_prompt(2, 12)[1:]

    def talk(*, looked_at: bool) -> tuple[Any, ...]:
        """A slot that was given a memory, in the middle of a text on it."""
        client.erase_slot(0)
        generate(client, first, 4, id_slot=0)
        client.save_memory(0, "given.bin")
        client.restore_memory(0, "given.bin")
        begun = generate(client, random_prompt(3, 40), 8, id_slot=0, cache_prompt=True)["tokens"]
        if looked_at:
            before = client.slots()[0]["rwkv_ms"]
            assert check_health(target(running)).ok
            assert client.slots()[0]["rwkv_ms"] == before
        text = [*random_prompt(3, 40), *begun, *more]
        on = generate(client, text, 12, id_slot=0, cache_prompt=True)
        anew = generate(client, more, 12, id_slot=0, cache_prompt=False)  # on the memory that was given
        return begun, on["tokens"], on["timings"]["prompt_n"], anew["tokens"]

    assert talk(looked_at=True) == talk(looked_at=False)
    assert [path.name for path in (tmp_path / "slots").iterdir()] == ["given.bin"]


def test_conversations_in_other_slots_are_not_even_looked_at(start: Start) -> None:
    running = start("batched", parallel=3)
    for slot in (0, 2):
        generate(running.client, random_prompt(slot, 40), 4, id_slot=slot)
    before = [running.client.slots()[slot]["id_task"] for slot in (0, 2)]
    assert check_health(target(running)).ok
    after = running.client.slots()
    assert [after[slot]["id_task"] for slot in (0, 2)] == before and after[1]["rwkv_ms"]["tokens_written"] == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_conversation_is_there_however_health_ends(start: Start, number: signal.Signals) -> None:
    """In the only slot there is; after SIGKILL the next run puts it back."""
    running = start("serial")
    client, text = running.client, random_prompt(1, 60)
    generate(client, text, 4, id_slot=0)
    client.give_memory(0, client.take_memory(0)[0])
    text = [*text, *generate(client, text, 8, id_slot=0)["tokens"][:7]]
    before = client.slots()[0]["rwkv_ms"]
    command = [sys.executable, "-m", "llamamem.cli", "health", "--run", running.server.record.run_id]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as health:
        until(lambda: client.slots()[0]["rwkv_ms"] != before or health.poll() is not None)
        health.send_signal(number)
        health.wait(60)
    if number == signal.SIGKILL:
        assert client.slots()[0]["rwkv_ms"] != before, "it was killed while it was at it"
        assert check_health(target(running)).ok
    assert client.slots()[0]["rwkv_ms"] == before
    on = generate(client, [*text, *random_prompt(2, 5)[1:]], 4, id_slot=0, cache_prompt=True)
    assert on["timings"]["prompt_n"] < 10, "its KV cache too"


def test_a_base_only_server(start: Start) -> None:
    report = check_health(target(start("base", parallel=1)))
    assert failed(report) == ["binding", "log", "props", *CHECK_IDS[8:]]
    assert all("llamamem serve" in (check.hint or "") for check in report.checks if not check.ok)


def test_another_sidecars_file(start: Start) -> None:
    assert failed(check_health(replace(target(start("serial")), sidecar=V2))) == ["log", "props"]


def test_the_log_of_an_earlier_run(start: Start) -> None:
    earlier = start("serial")
    earlier.server.stop()
    now = target(start("serial"))
    assert failed(check_health(replace(now, log=earlier.server.log_path))) == ["log"]
    # nor when nobody knows which run it was
    assert failed(check_health(replace(now, log=earlier.server.log_path, run_id=None))) == ["log"]


def test_a_base_that_was_changed_under_the_server(start: Start, model: Path, tmp_path: Path) -> None:
    base = Path(shutil.copy(model, tmp_path / "base.gguf"))
    now = target(start("serial", base=base))
    with base.open("ab") as file:
        file.write(b"\0")
    assert failed(check_health(now)) == ["binding"]


def test_a_slot_that_somebody_silenced_stays_so_and_a_zeroed_memory_is_found(
    start: Start, sidecar: Path, tmp_path: Path
) -> None:
    running = start("fused")
    running.client.set_memory(0, scale=0.0)
    assert failed(check_health(target(running))) == []
    assert running.client.slots()[0]["rwkv_ms"]["scale"] == 0
    zeroed = tmp_path / "zeroed.gguf"
    zero_sidecar(sidecar, zeroed)
    assert failed(check_health(target(start("serial", memory=zeroed)))) == ["causal"]


def test_a_busy_server_is_healthy_and_a_zeroed_memory_in_it_is_not(start: Start, sidecar: Path, tmp_path: Path) -> None:
    zeroed = tmp_path / "zeroed.gguf"
    zero_sidecar(sidecar, zeroed)
    for memory, checks in ((sidecar, []), (zeroed, ["causal"])):
        running, done = start("batched", parallel=3, memory=memory), threading.Event()

        def talk(slot: int, url: str = running.server.url, done: threading.Event = done) -> None:
            with Client(url) as client:
                while not done.is_set():
                    generate(client, random_prompt(slot, 50 * slot), 40, id_slot=slot)

        with ThreadPoolExecutor(2) as pool:
            talks = [pool.submit(talk, slot) for slot in (1, 2)]
            try:
                until(lambda client=running.client: all(s["rwkv_ms"]["n_text"] for s in client.slots()[1:]))
                for _ in range(3):
                    assert failed(check_health(target(running))) == checks
            finally:
                done.set()
        for each in talks:
            each.result()


def stock_restore(path: str, status: int, answer: Any, http: httpx.Client) -> tuple[int, Any]:
    """200, and the state is thrown away."""
    if path.endswith("action=restore") and status == 200:
        http.post(path.partition("?")[0] + "?action=erase", json={})
    return status, answer


def believes(reason: str) -> Change:
    def change(path: str, status: int, answer: Any, http: httpx.Client) -> tuple[int, Any]:
        return (200, {}) if reason in str(answer) else (status, answer)

    return change


def says(where: str, edit: Callable[[Any], Any]) -> Change:
    def change(path: str, status: int, answer: Any, http: httpx.Client) -> tuple[int, Any]:
        if path == where:
            edit(answer)
        return status, answer

    return change


def refuses_and_clears(path: str, status: int, answer: Any, http: httpx.Client) -> tuple[int, Any]:
    """As stock llama-server does."""
    if "state-truncated" in str(answer) and path.startswith("/slots/"):
        http.post(path.partition("?")[0] + "?action=erase", json={})
    return status, answer


CHANGES: list[tuple[str, Change, list[str]]] = [
    ("stock build", says("/props", lambda answer: answer.pop("llamamem_build")), ["binary"]),
    ("another model", says("/v1/models", lambda answer: answer["data"][0].update(id="another")), ["models"]),
    ("two slots", says("/props", lambda answer: answer.update(total_slots=2)), ["constraints"]),
    ("another base", says("/props", lambda answer: answer["rwkv_ms"].update(base_sha256="0" * 64)), ["props"]),
    (
        "no text",
        says("/v1/chat/completions", lambda answer: answer["choices"][0]["message"].update(content="")),
        ["chat"],
    ),
    ("a state that is thrown away", stock_restore, ["slot_roundtrip"]),
    ("a damaged state that is accepted", believes("state-checksum"), ["corrupt_restore"]),
    ("a cut state that is accepted", believes("state-truncated"), ["corrupt_restore"]),
    ("a refusal that clears the slot", refuses_and_clears, ["corrupt_restore"]),
    ("a foreign state that is accepted", believes("state-identity"), ["foreign_restore"]),
]


def test_each_lie_fails_its_check_alone(start: Start) -> None:
    running = start("serial")
    for what, change, checks in CHANGES:
        with LyingProxy(running.server.url, change) as proxy:
            assert failed(check_health(replace(target(running), url=proxy.url))) == checks, what
    assert check_health(target(running)).ok


def test_a_reference_trace(start: Start, tmp_path: Path) -> None:
    running, path = start("serial"), tmp_path / "trace.json"
    answer = running.client.chat([{"role": "user", "content": "Who keeps the light?"}], max_tokens=12)
    said = answer["choices"][0]["message"]["content"]
    # a memory that somebody gave to the slot must not get into it
    generate(running.client, random_prompt(1, 60), 2, id_slot=0)
    running.client.save_memory(0, "given.bin")
    running.client.restore_memory(0, "given.bin")
    for text, checks in ((said, []), (f"{said[:-1]}#", ["trace"])):
        generation = {"prompt": "Who keeps the light?", "max_new_tokens": 12, "do_sample": False}
        schema = "delta_mem_rwkv_ms_reference_trace.v1"
        trace = {"schema": schema, "generation": generation, "result": {"assistant_display": text}, "session": {}}
        path.write_text(json.dumps(trace))
        assert failed(check_health(replace(target(running), trace=path))) == checks
