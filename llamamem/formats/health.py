"""What `llamamem health` found out about one server: the object that `--json` prints and `--output` writes."""

from __future__ import annotations

import os
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from pathlib import Path

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from llamamem.errors import LlamamemError
from llamamem.formats.run import RunRecord
from llamamem.formats.validation import first_fault

# in the order of the report
CHECK_IDS = (
    *("binary", "binding", "models", "constraints", "log", "props", "chat", "trace"),
    *("slot_roundtrip", "corrupt_restore", "foreign_restore", "causal"),
)

_AHEAD = timedelta(minutes=1)  # by which another machine's clock may differ


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Check(_Model):
    """One line of the report. `detail` says what was found, `hint` what to do next (None when it holds)."""

    id: str
    ok: bool
    detail: str
    hint: str | None = None
    ms: float = Field(ge=0)


class FileHash(_Model):
    """A file as it was when it was checked; without a hash it could not be read."""

    path: str
    sha256: str | None = None


class HealthReport(_Model):
    """All checks of one server at one time (UTC). `model` is the name that it is served by; `run_id` and `log` are None
    for a server that `llamamem serve` did not start."""

    ok: bool
    run_id: str | None
    timestamp: AwareDatetime
    url: str
    model: str | None
    base: FileHash | None
    sidecar: FileHash | None
    log: str | None
    checks: tuple[Check, ...]


def read_health(path: Path) -> HealthReport:
    """Raises LlamamemError when the file is missing or is not a report."""
    try:
        return HealthReport.model_validate_json(path.read_bytes())
    except OSError as e:
        raise LlamamemError(f"{path}: cannot read the health report ({e.strerror}); run `llamamem health`") from e
    except ValidationError as e:
        raise LlamamemError(f"{path}: not a health report: {first_fault(e)}; give another file") from None


def check_output(path: Path) -> None:
    """Refuses what a report cannot be written to, before any check is made: a file that is something else stays."""
    if path.exists():
        read_health(path)
    elif not path.parent.is_dir():
        raise LlamamemError(f"{path}: no such directory; make it, or give another --output")


def write_health(report: HealthReport, path: Path) -> None:
    """Written beside `path` and renamed."""
    check_output(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as e:
        raise LlamamemError(f"{path}: cannot be written ({e.strerror}); give another --output") from e
    finally:
        temporary.unlink(missing_ok=True)


def withdraw_health(path: Path) -> None:
    """Removes the report of a server that cannot be asked any more; a file that is something else stays."""
    with suppress(LlamamemError, OSError):
        read_health(path)
        path.unlink()


def health_fault(path: Path, record: RunRecord, *, max_age: timedelta, now: datetime | None = None) -> str | None:
    """Is this file a recent success for exactly this server? None if it is, else why it is not, in one line.

    The same run at the same address, with the same base, sidecar and log; every check was made after the server was
    started, held, and is at most `max_age` old. Nothing is asked of the server, and no file but `path` is read.
    """
    try:
        report = read_health(path)
    except LlamamemError as e:
        return str(e)
    faults = (_of_another(report, record), _not_a_success(report), _not_recent(report, record, max_age, now))
    return next((f"{path}: {fault}; run `llamamem health` again" for fault in faults if fault), None)


def _of_another(report: HealthReport, record: RunRecord) -> str | None:
    recorded = {
        "run_id": (report.run_id, record.run_id),
        "url": (report.url, record.url),
        "base": (report.base, _file(record.model, record.base_sha256)),
        "sidecar": (report.sidecar, _file(record.sidecar, record.sidecar_sha256)),
        "log": (report.log, record.log),
    }
    differing = [name for name, (found, wanted) in recorded.items() if found != wanted]
    return f"is about another server ({', '.join(differing)})" if differing else None


def _file(path: str | None, sha256: str | None) -> FileHash | None:
    return None if path is None else FileHash(path=path, sha256=sha256)


def _not_a_success(report: HealthReport) -> str | None:
    failed = [check.id for check in report.checks if not check.ok]
    if failed or not report.ok:
        return f"says that the server failed {', '.join(failed) or 'its checks'}"
    missing = [name for name in CHECK_IDS if name not in {check.id for check in report.checks}]
    return f"has no {', '.join(missing)}" if missing else None


def _not_recent(report: HealthReport, record: RunRecord, max_age: timedelta, now: datetime | None) -> str | None:
    now = now or datetime.now(timezone.utc)
    if report.timestamp > now + _AHEAD:
        return f"is dated {report.timestamp.isoformat()}, which is in the future"
    if report.timestamp.timestamp() < record.started:
        return "is older than the server"
    age = now - report.timestamp
    return (
        f"is {int(age.total_seconds())} s old, {int(max_age.total_seconds())} s are allowed" if age > max_age else None
    )
