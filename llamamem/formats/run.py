"""The record of one server run: a JSON file that other commands find a running server by.

One file a run, `<state dir>/runs/<run id>.json`, beside `<run id>.log`. It is written beside its target and renamed,
readable by its owner only. A pid is worth nothing without the creation time of its process: whoever signals a recorded
server compares both.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import platformdirs
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from llamamem.errors import LlamamemError
from llamamem.formats.private import private_directory
from llamamem.formats.validation import first_fault

State = Literal["starting", "ready", "stopped", "killed", "exited", "failed"]


class RunRecord(BaseModel):
    """What was started, how, and how it ended. Times are seconds since the epoch; hashes are SHA-256 in hex.

    `name` is the run id unless one was given; of the runs that live at one time each has its own. `launcher_stops`: the
    launcher is `llamamem serve`, which stops its server in order when it is signalled; any other program just dies.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["llamamem_run.v1"] = "llamamem_run.v1"
    run_id: str
    name: str
    state: State
    pid: int
    create_time: float
    launcher_pid: int
    launcher_create_time: float = 0.0
    launcher_stops: bool = False
    host: str
    port: int
    url: str
    gateway: str | None = None  # URL of the gateway in front of it, which is where clients ask
    profile: str
    model: str
    base_sha256: str | None = None
    sidecar: str | None = None
    sidecar_sha256: str | None = None
    slot_dir: str | None = None
    log: str
    argv: list[str]
    build: str | None = None
    started: float
    ended: float | None = None
    exit_code: int | None = None

    @model_validator(mode="before")
    @classmethod
    def _named(cls, data: Any) -> Any:
        return {"name": data["run_id"], **data} if isinstance(data, dict) and "run_id" in data else data


def state_dir() -> Path:
    """`$XDG_STATE_HOME/llamamem`: run records, logs and slot files."""
    return Path(platformdirs.user_state_path("llamamem", appauthor=False))


def runs_dir() -> Path:
    return state_dir() / "runs"


def write_run(record: RunRecord, path: Path) -> None:
    private_directory(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            file.write(record.model_dump_json(indent=2) + "\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_run(path: Path) -> RunRecord:
    """Raises LlamamemError when the file is missing or is not a run record."""
    try:
        return RunRecord.model_validate_json(path.read_bytes())
    except OSError as e:
        raise LlamamemError(f"{path}: cannot read the run record ({e.strerror})") from e
    except ValidationError as e:
        raise LlamamemError(f"{path}: not a run record: {first_fault(e)}; remove the file") from e


def redacted(argv: list[str] | tuple[str, ...]) -> list[str]:
    """argv with the values of secrets replaced: a record may be pasted into a bug report."""
    out: list[str] = []
    for arg in argv:
        name, _, value = arg.partition("=")
        if out and out[-1] in _SECRETS:
            out.append("***")
        elif name in _SECRETS and value:
            out.append(f"{name}=***")
        else:
            out.append(arg)
    return out


_SECRETS = {"--api-key", "--api_key", "-hft", "--hf-token", "--hf_token"}
