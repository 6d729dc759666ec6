from __future__ import annotations

from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from llamamem.errors import LlamamemError
from llamamem.formats.health import (
    CHECK_IDS,
    Check,
    FileHash,
    HealthReport,
    check_output,
    health_fault,
    read_health,
    withdraw_health,
    write_health,
)
from llamamem.formats.run import RunRecord

NOW = datetime(2026, 5, 4, 12, 0, tzinfo=timezone.utc)
HOUR = timedelta(hours=1)

RECORD = RunRecord(
    run_id="20260504-110000-abcdef",
    name="20260504-110000-abcdef",
    state="ready",
    pid=1,
    create_time=1.0,
    launcher_pid=1,
    host="127.0.0.1",
    port=8080,
    url="http://127.0.0.1:8080",
    profile="serial",
    model="/m/base.gguf",
    base_sha256="ba" * 32,
    sidecar="/m/memory.gguf",
    sidecar_sha256="5c" * 32,
    log="/runs/a.log",
    argv=["llama-server"],
    started=(NOW - HOUR).timestamp(),
)


def report(**changes: Any) -> HealthReport:
    fields: dict[str, Any] = {
        "ok": True,
        "run_id": RECORD.run_id,
        "timestamp": NOW - timedelta(minutes=5),
        "url": RECORD.url,
        "model": "base",
        "base": FileHash(path="/m/base.gguf", sha256="ba" * 32),
        "sidecar": FileHash(path="/m/memory.gguf", sha256="5c" * 32),
        "log": "/runs/a.log",
        "checks": tuple(Check(id=id, ok=True, detail="fine", ms=1) for id in CHECK_IDS),
    }
    return HealthReport(**{**fields, **changes})


def fault(tmp_path: Path, found: HealthReport, record: RunRecord = RECORD) -> str | None:
    path = tmp_path / "health.json"
    path.write_text(found.model_dump_json())
    return health_fault(path, record, max_age=timedelta(minutes=10), now=NOW)


def test_a_recent_success_for_exactly_this_server_is_one(tmp_path: Path) -> None:
    assert fault(tmp_path, report()) is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"run_id": "20260504-110000-000000"}, "another server (run_id)"),
        ({"run_id": None}, "another server (run_id)"),
        ({"url": "http://127.0.0.1:8081"}, "another server (url)"),
        ({"base": FileHash(path="/m/base.gguf", sha256="00" * 32)}, "another server (base)"),
        ({"base": FileHash(path="/m/base.gguf")}, "another server (base)"),
        ({"sidecar": FileHash(path="/m/other.gguf", sha256="5c" * 32)}, "another server (sidecar)"),
        ({"sidecar": None}, "another server (sidecar)"),
        ({"log": "/runs/b.log"}, "another server (log)"),
        ({"ok": False}, "failed its checks"),
        ({"checks": (Check(id="causal", ok=False, detail="no", hint="x", ms=1),)}, "failed causal"),
        ({"checks": ()}, "has no binary"),
        ({"checks": report().checks[:-1]}, "has no causal"),
        ({"timestamp": NOW - timedelta(minutes=11)}, "660 s old, 600 s are allowed"),
        ({"timestamp": NOW + timedelta(minutes=2)}, "in the future"),
    ],
)
def test_what_is_not_a_recent_success_for_this_server_says_why(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    assert said in (fault(tmp_path, report(**changes)) or "")


def test_a_report_from_before_the_server_was_started_is_none(tmp_path: Path) -> None:
    later = RECORD.model_copy(update={"started": (NOW - timedelta(minutes=4)).timestamp()})
    assert "older than the server" in (fault(tmp_path, report(), later) or "")


@pytest.mark.parametrize("text", [b"", b"{}", b'{"ok": true}', b"\xff", b'[{"ok": true}]'])
def test_what_is_no_report_is_no_success(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "health.json"
    assert "cannot read the health report" in (health_fault(path, RECORD, max_age=HOUR, now=NOW) or "")
    path.write_bytes(text)
    assert "not a health report" in (health_fault(path, RECORD, max_age=HOUR, now=NOW) or "")


def test_written_and_read_again_it_is_the_same(tmp_path: Path) -> None:
    path = tmp_path / "health.json"
    write_health(report(), path)
    write_health(report(ok=False), path)
    assert read_health(path) == report(ok=False)
    assert [file.name for file in tmp_path.iterdir()] == ["health.json"]


def test_a_file_of_another_kind_stays(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    for refused in (lambda: check_output(path), lambda: write_health(report(), path)):
        with pytest.raises(LlamamemError, match="not a health report"):
            refused()
    withdraw_health(path)
    assert path.read_text() == "mine"
    with pytest.raises(LlamamemError, match="no such directory"):
        check_output(tmp_path / "missing" / "health.json")
