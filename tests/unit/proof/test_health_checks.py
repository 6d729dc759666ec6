"""Every check against the lying server: an honest one is healthy, and each lie is found by the check about it."""

from __future__ import annotations

import base64
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lying_server import LyingServer, Refused

from llamamem.errors import LlamamemError
from llamamem.formats.health import CHECK_IDS, HealthReport
from llamamem.proof.health import Target, check_health
from llamamem.serving.slots import held

Start = Callable[..., tuple[LyingServer, Target]]


@pytest.fixture
def start(tmp_path: Path, model_a: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """`start("a lie", profile="fused")`: a server, and what its run record would say."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr("llamamem.proof.health.log._LATE", 0.2)
    with ExitStack() as stack:

        def make(*lies: str, profile: str = "serial", **options: Any) -> tuple[LyingServer, Target]:
            files = {name: tmp_path / name for name in ("model-f32.gguf", "sidecar-v1.gguf")}
            for name, path in files.items():
                shutil.copy(model_a / name, path)
            model, sidecar = files.values()
            server = stack.enter_context(LyingServer(tmp_path, model, sidecar, set(lies), profile=profile, **options))
            target = Target(
                server.url,
                run_id=server.run_id,
                profile=profile,
                parallel=len(server.slots),
                model=model,
                sidecar=sidecar,
                log=server.log,
                slot_dir=server.slot_dir,
            )
            return server, target

        yield make


def failed(report: HealthReport) -> list[str]:
    assert [check.id for check in report.checks] == list(CHECK_IDS)
    assert report.ok == all(check.ok for check in report.checks)
    for check in report.checks:
        assert check.detail and (check.ok or check.hint), check
    return [check.id for check in report.checks if not check.ok]


def detail(report: HealthReport, id: str) -> str:
    return next(check.detail for check in report.checks if check.id == id)


@pytest.mark.parametrize("profile", ["serial", "fused", "batched"])
def test_an_honest_server_is_healthy(start: Start, profile: str) -> None:
    server, target = start(profile=profile)
    report = check_health(target)
    assert failed(report) == [] and report.ok
    assert report.base is not None and report.base.sha256 == server.identity.base_sha256
    assert report.sidecar is not None and report.sidecar.sha256 == server.identity.sidecar_sha256
    assert (report.run_id, report.url, report.log) == (server.run_id, server.url, str(server.log))


LIES = [
    ("stock build", "binary", "not the patched llama-server"),
    ("other build", "binary", "000000000+000000000000"),
    ("other model", "models", "another-model"),
    ("no model", "models", "lists none"),
    ("other model file", "models", "/models/other.gguf"),
    ("other mode", "constraints", "runs as batched"),
    ("more slots", "constraints", "has 2 slots, not 1"),
    ("takes images", "constraints", "vision"),
    ("speculates", "constraints", "speculates"),
    ("reuses unasked", "constraints", "reused unasked"),
    ("no rollback line", "log", "rolled back"),
    ("props sidecar_sha256", "props", "sidecar_sha256 0000"),
    ("props base_sha256", "props", "base_sha256 0000"),
    ("props fingerprint", "props", "fingerprint 0000"),
    ("props chunk", "props", "chunk 0000"),
    ("loaded another sidecar", "props", "a memory that it saves is of sidecar 5c5c"),
    ("silent", "chat", "no text"),
    ("500 in /v1/chat/completions", "chat", "out of order"),
    ("nonsense in /v1/chat/completions", "chat", "not as expected"),
    ("dies in /v1/chat/completions", "chat", "is the server running"),
    ("stock restore", "slot_roundtrip", "were restored: they were thrown away"),
    ("restore without memory", "slot_roundtrip", "not the one that was saved"),
    ("restores another KV cache", "slot_roundtrip", "the continuation differs at new token 0 ("),
    ("accepts damaged", "corrupt_restore", "was accepted"),
    ("500 on refusal", "corrupt_restore", "must be 400 [state-checksum]"),
    ("accepts foreign", "foreign_restore", "was accepted"),
    ("disconnected", "causal", "are those with none"),
    ("deaf to scale", "causal", "not the base's"),
    ("echo", "causal", "not the base's"),
]


@pytest.mark.parametrize(("lie", "check", "said"), LIES, ids=[lie for lie, _, _ in LIES])
def test_a_lie_is_found_by_its_check_alone(start: Start, lie: str, check: str, said: str) -> None:
    report = check_health(start(lie)[1])
    assert failed(report) == [check]
    assert said in detail(report, check)


@pytest.mark.parametrize(
    ("lie", "checks"),
    [
        ("clears on refusal", ["corrupt_restore", "foreign_restore"]),
        ("forgets on refusal", ["corrupt_restore"]),
        ("wrong reason", ["corrupt_restore", "foreign_restore"]),
        ("unrepeatable", ["slot_roundtrip", "corrupt_restore", "causal"]),
        ("erases text alone", ["corrupt_restore"]),
        ("writes nothing", ["slot_roundtrip", "causal"]),
    ],
)
def test_a_lie_about_the_state_is_found_by_all_that_it_breaks(start: Start, lie: str, checks: list[str]) -> None:
    assert failed(check_health(start(lie)[1])) == checks


def test_a_base_that_was_replaced_fails_the_binding_alone(start: Start) -> None:
    _, target = start()
    assert target.model is not None
    with target.model.open("ab") as file:
        file.write(b"\0")
    report = check_health(target)
    assert failed(report) == ["binding"]
    target.model.unlink()
    report = check_health(target)
    assert failed(report) == ["binding"] and report.base is not None and report.base.sha256 is None


def test_a_sidecar_that_was_replaced_is_not_the_one_that_is_served(start: Start, model_a: Path) -> None:
    _, target = start()
    shutil.copy(model_a / "sidecar-v2.gguf", str(target.sidecar))
    report = check_health(target)
    assert failed(report) == ["log", "props"]
    assert "the files say" in detail(report, "props")


def test_a_slot_without_a_memory_of_its_own_breaks_the_profile(start: Start) -> None:
    report = check_health(start("memory in slot 0 alone", profile="batched")[1])
    assert failed(report) == ["constraints"] and "slot 1 has no memory" in detail(report, "constraints")


def test_a_binary_that_was_another_when_it_was_started(start: Start) -> None:
    report = check_health(replace(start()[1], build="000000000+000000000000"))
    assert failed(report) == ["binary"] and "the binary that was started said" in detail(report, "binary")


BUSY = ("others are busy", "jitter")


@pytest.mark.parametrize(
    ("lies", "checks"),
    [
        (BUSY, []),
        (("jitter",), ["slot_roundtrip", "corrupt_restore", "causal"]),
        ((*BUSY, "disconnected"), ["causal"]),
        ((*BUSY, "deaf to scale"), ["causal"]),
        ((*BUSY, "stock restore"), ["slot_roundtrip"]),
        ((*BUSY, "restores another KV cache"), ["slot_roundtrip"]),
        ((*BUSY, "forgets on refusal"), ["corrupt_restore"]),
    ],
)
def test_the_rounding_of_a_busy_server_is_allowed_and_nothing_else(
    start: Start, lies: tuple[str, ...], checks: list[str]
) -> None:
    report = check_health(start(*lies, profile="batched")[1])
    assert failed(report) == checks
    if lies == BUSY:
        assert "as far as a busy server tells" in detail(report, "slot_roundtrip")


def test_a_refusal_that_drops_the_text_is_found_though_the_answer_is_the_same(start: Start) -> None:
    assert "tokens were processed, not" in detail(check_health(start("forgets on refusal")[1]), "corrupt_restore")


def test_the_same_memory_must_give_the_same_logits(start: Start) -> None:
    assert "the second time" in detail(check_health(start("unrepeatable")[1]), "causal")


EVIDENCE = ("memory active", "one slot", "prompt cache", "context checkpoints", "warm-up", "slot save", "exact-prefix")


@pytest.mark.parametrize("line", EVIDENCE)
def test_a_line_of_evidence_that_is_missing_or_twice_fails_the_log_alone(
    start: Start, line: str, tmp_path: Path
) -> None:
    server, target = start(log_lines=lambda lines: [text for text in lines if line not in text])
    report = check_health(target)
    assert failed(report) == ["log"] and line in detail(report, "log")
    server.log.write_text("".join(f"{text}\n" for text in [*server.first_lines(), server.first_lines()[1]]))
    report = check_health(target)
    assert failed(report) == ["log"] and "2 lines `memory: memory active" in detail(report, "log")


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda line: line.replace("abcdef", "012345"), "does not begin with this run"),
        (lambda line: line.replace("prompt cache off", "prompt cache on"), "no line `memory: prompt cache off"),
        (lambda line: line.replace("warm-up skipped", "warm-up done"), "no line `memory: warm-up skipped"),
        (lambda line: line.replace("mode=serial", "mode=fused"), "mode=fused, not serial"),
        (lambda line: line.replace("chunk=", "chunk=1"), "memory active with chunk=1"),
        (lambda line: line.replace("layers=0-5", "layers=0-3"), "memory active in layers [0, 1, 2, 3]"),
        (lambda line: line.replace("sidecar=", "sidecar=0"), "memory active with sidecar=0"),
        (lambda line: line.replace("/slots/", "/elsewhere/"), "slots are saved in"),
    ],
)
def test_a_line_of_evidence_that_says_something_else_fails_the_log_alone(
    start: Start, edit: Callable[[str], str], said: str
) -> None:
    report = check_health(start(log_lines=lambda lines: list(map(edit, lines)))[1])
    assert failed(report) == ["log"] and said in detail(report, "log")


def test_the_log_of_an_earlier_run_with_the_same_files_is_not_taken(start: Start, tmp_path: Path) -> None:
    server, target = start()
    # whoever copies every line, the first one too, cannot copy what the server writes next
    old = tmp_path / "old.log"
    shutil.copy(server.log, old)
    report = check_health(replace(target, log=old))
    assert failed(report) == ["log"] and "rolled back" in detail(report, "log")
    report = check_health(replace(target, run_id="20260101-000000-ffffff"))
    assert failed(report) == ["log"] and "does not begin with this run" in detail(report, "log")
    server.log.rename(tmp_path / "gone.log")
    assert failed(check_health(target)) == ["log"]


def test_a_log_in_colors_is_read(start: Start) -> None:
    paint = "\x1b[32m{}\x1b[0m".format
    assert failed(check_health(start(log_lines=lambda lines: [lines[0], *map(paint, lines[1:])])[1])) == []


def test_a_server_without_the_memory_that_was_asked_for(start: Start) -> None:
    assert failed(check_health(start("base only")[1])) == ["constraints", "log", "props", *CHECK_IDS[8:]]


def test_a_base_only_server_fails_what_is_about_memory_with_a_hint(start: Start) -> None:
    _, target = start("base only")
    report = check_health(replace(target, profile="base", sidecar=None, parallel=None))
    assert failed(report) == ["binding", "log", "props", *CHECK_IDS[8:]]
    hints = {check.hint for check in report.checks if not check.ok}
    assert hints == {"start it with `llamamem serve --model BASE --sidecar SIDECAR`"}


def test_a_reference_trace_is_compared(start: Start, tmp_path: Path) -> None:
    _, target = start()
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(TRACE))
    report = check_health(replace(target, trace=path))
    assert failed(report) == [] and "equal" in detail(report, "trace")
    path.write_text(json.dumps({**TRACE, "result": {"assistant_display": "Goodbye."}}))
    report = check_health(replace(target, trace=path))
    assert failed(report) == ["trace"] and "'H'" in detail(report, "trace")
    with pytest.raises(LlamamemError, match=r"missing\.json"):
        check_health(replace(target, trace=tmp_path / "missing.json"))
    report = check_health(target)
    assert "no reference trace was given" in detail(report, "trace")


TRACE = {
    "schema": "delta_mem_rwkv_ms_reference_trace.v1",
    "generation": {"prompt": "Hello?", "max_new_tokens": 4, "do_sample": False},
    "result": {"assistant_display": "Hello."},
    "session": {},
}


@pytest.mark.parametrize(
    ("lie", "checks"),
    [
        ("hangs in /completion", ["constraints", "chat", *CHECK_IDS[8:]]),
        ("dies in /completion", ["constraints", *CHECK_IDS[8:]]),
        ("nonsense in /completion", ["constraints", *CHECK_IDS[8:]]),
        ("nonsense in /slots", ["constraints", "log", "props", *CHECK_IDS[8:]]),
        ("500 in /slots", ["constraints", "log", "props", *CHECK_IDS[8:]]),
        ("nonsense in /v1/models", ["models"]),
        ("nonsense in /tokenize", ["constraints", *CHECK_IDS[8:]]),
        ("cannot save", ["props", *CHECK_IDS[8:]]),
    ],
)
def test_a_server_that_breaks_down_fails_checks_and_nothing_else(start: Start, lie: str, checks: list[str]) -> None:
    server, target = start(lie)
    report = check_health(target, timeout=0.5)
    found = failed(report)
    if lie == "hangs in /completion":  # it is waited for once
        assert server.asked.count("/completion") == 1
        assert "not tried" in detail(report, "causal") and "not put back" in detail(report, "slot_roundtrip")
        assert found == ["constraints", "log", "props", "chat", *CHECK_IDS[8:]]
    else:
        assert found == checks
    assert not any("Traceback" in check.detail for check in report.checks)


@pytest.mark.parametrize(
    "lie", ["hangs in /health", "dies in /health", "500 in /health", "nonsense in /props", "dies in /props"]
)
def test_a_server_that_cannot_be_asked_is_an_error_of_one_line(start: Start, lie: str) -> None:
    server, target = start(lie)
    with pytest.raises(LlamamemError, match=server.url) as error:
        check_health(target, timeout=0.5)
    assert error.value.exit_status == 2


def test_slots_and_directory_are_afterwards_as_they_were(start: Start) -> None:
    server, target = start(profile="batched")
    server.complete({"id_slot": 0, "prompt": [2, 50, 51, 52], "n_predict": 3})
    before = deepcopy(server.slots)
    (server.slot_dir / "mine.state").write_bytes(b"mine")
    assert check_health(target).ok
    assert server.slots == before
    assert [path.name for path in server.slot_dir.iterdir()] == ["mine.state"]


def test_a_slot_that_holds_something_is_not_touched_while_another_one_holds_nothing(start: Start) -> None:
    server, target = start(profile="batched")
    for slot in (0, 2):
        server.complete({"id_slot": slot, "prompt": [2, 50, 51, 52], "n_predict": 3})
    act, acted = server.act, set()
    server.act = lambda action, slot, body: (acted.add(slot), act(action, slot, body))[1]  # type: ignore[method-assign]
    assert check_health(target).ok and acted == {1}


def use_the_only_slot(server: LyingServer) -> Any:
    """A memory that was given, a text on it, a setting of its own."""
    server.act("memory-restore", 0, {"memory": base64.b64encode(server.encode(server.slots[0], whole=False)).decode()})
    server.complete({"id_slot": 0, "prompt": [2, 50, 51, 52], "n_predict": 3})
    server.act("memory-set", 0, {"frozen": True, "scale": 1.0})
    return deepcopy(server.slots[0])


def test_the_only_slot_is_put_back_with_its_setting(start: Start) -> None:
    server, target = start()
    before = use_the_only_slot(server)
    assert check_health(target).ok
    after = server.slots[0]
    assert (after.text, after.memory, after.scale, after.frozen) == (before.text, before.memory, 1.0, True)
    assert list(server.slot_dir.iterdir()) == []


KILLED = """
import os, sys
from pathlib import Path
from llamamem.proof.health import Target, check_health
from llamamem.proof.health import table
url, run_id, slot_dir, end = sys.argv[1:]
def on_check(name):
    if name == "causal":
        os.kill(os.getpid(), 9)
check_health(Target(url, run_id=run_id, slot_dir=Path(slot_dir)), on_check=on_check)
"""


def test_after_a_kill_the_next_run_puts_back_what_was_moved(start: Start) -> None:
    server, target = start()
    before = use_the_only_slot(server)
    command = [sys.executable, "-c", KILLED, server.url, server.run_id, str(server.slot_dir), ""]
    assert subprocess.run(command, timeout=60, check=False).returncode == -signal.SIGKILL
    assert server.slots[0].text != before.text and len(list(server.slot_dir.iterdir())) > 0
    server.slots[0].given = False  # as the real one has it after an erase
    check_health(target)
    after = server.slots[0]
    assert (after.text, after.memory, after.frozen) == (before.text, before.memory, before.frozen)
    assert not [path for path in server.slot_dir.iterdir() if "kept" in path.name]


def test_what_was_kept_of_another_run_of_the_server_is_not_put_back(start: Start) -> None:
    server, target = start()
    before = use_the_only_slot(server)
    command = [sys.executable, "-c", KILLED, server.url, "20250101-000000-bbbbbb", str(server.slot_dir), ""]
    assert subprocess.run(command, timeout=60, check=False).returncode == -signal.SIGKILL
    server.act("erase", 0, {})  # a fresh server
    check_health(target)
    assert server.slots[0].memory != before.memory and server.slots[0].text == []


def test_a_slot_that_cannot_be_put_back_is_a_failure(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    server, target = start()
    use_the_only_slot(server)
    restore = server.restore

    def fail(slot: Any, path: Path) -> None:
        if path.name.endswith("kept.state"):
            raise Refused("out of order")
        restore(slot, path)

    monkeypatch.setattr(server, "restore", fail)
    report = check_health(target)
    assert failed(report) == ["slot_roundtrip"]
    assert "slot 0 was not put back" in detail(report, "slot_roundtrip")


def test_a_session_that_is_at_work_in_the_slot_is_left_alone(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    server, target = start()
    monkeypatch.setattr("llamamem.proof.health.kept._WAIT", 0.05)
    with held(server.url, 0, 1):
        report = check_health(target)
        assert "slot 0: another process was at it" in detail(report, "causal")
        assert "/completion" not in server.asked
    assert check_health(target).ok


def test_the_wrong_slot_directory_is_said(start: Start, tmp_path: Path) -> None:
    _, target = start()
    report = check_health(replace(target, slot_dir=tmp_path))
    assert "--slot-save-path" in detail(report, "slot_roundtrip")
    report = check_health(replace(target, slot_dir=None))
    assert "not known" in detail(report, "slot_roundtrip")
