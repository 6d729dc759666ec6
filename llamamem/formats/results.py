"""Answers to a suite: JSON Lines that are only ever appended to, one object an answer.

The last line of an id is the one that counts. Every line begins with the same bytes (`{"format": "llamamem_eval.v1", `)
and ends with a newline: what a killed writer left behind is told from an answer by the newline that it lacks.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from llamamem.errors import LlamamemError

_HEAD = b'{"format": "llamamem_eval.v1", '


class Served(BaseModel):
    """Who answered. Hashes are SHA-256 in hex, None where the server does not tell them; `mode` None: no memory."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run_id: str | None
    url: str
    model: str
    base_sha256: str | None
    sidecar_sha256: str | None
    mode: str | None

    def other_than(self, other: Served) -> str | None:
        """What makes answers of the two not answers of the same model, or None."""
        if None in (self.base_sha256, other.base_sha256):
            base = "model" if self.model != other.model else None
        else:
            base = "base_sha256" if self.base_sha256 != other.base_sha256 else None
        for name in (base, "sidecar_sha256", "mode"):
            if name is not None and getattr(self, name) != getattr(other, name):
                return f"{name} {getattr(self, name) or 'none'} instead of {getattr(other, name) or 'none'}"
        return None


class Answer(BaseModel):
    """`request` is the body that was sent, `request_sha256` that of all of it but where and on which memory.

    ok:          every expectation holds; None when the line has none.
    error:       the server's reason when it refused; then there is no response, and no expectation holds.
    latency_ms:  from sending the request to having the whole answer.
    memory:      after the answer: tokens_written, and origin, what it began on. None without a memory.
    time:        when it was asked, seconds since the epoch.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["llamamem_eval.v1"] = "llamamem_eval.v1"
    id: str
    group: str | None = None
    ok: bool | None
    failures: tuple[str, ...] = ()
    error: str | None = None
    request: dict[str, Any]
    request_sha256: str
    response: str | None = None
    reasoning: str | None = None
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None
    timings: dict[str, Any] | None = None
    latency_ms: float
    memory: dict[str, Any] | None = None
    served: Served
    time: float


def request_sha256(request: dict[str, Any]) -> str:
    asked = {key: value for key, value in request.items() if key not in ("id_slot", "rwkv_ms")}
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def read_results(path: Path) -> dict[str, Answer]:
    """The answers by id. Raises LlamamemError when the file is none of ours; a torn last line is left out."""
    try:
        return _parse(path, path.read_bytes())[0]
    except OSError as e:
        raise LlamamemError(f"results {path}: cannot be read ({e.strerror})") from e


class ResultsFile:
    """The file of one evaluation, its writer alone: `answers` are those that were there when it was opened.

    Raises LlamamemError when another process writes it, or when it holds anything but answers.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as e:
            raise LlamamemError(f"--output {path}: cannot be written ({e.strerror}); give a file of yours") from e
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with open(self._fd, "rb", closefd=False) as file:
                self.answers, whole = _parse(path, file.read())
            os.ftruncate(self._fd, whole)
        except OSError as e:
            os.close(self._fd)
            busy = isinstance(e, BlockingIOError)
            said = "another `llamamem eval` writes it" if busy else f"cannot be written ({e.strerror})"
            raise LlamamemError(f"--output {path}: {said}; give another file") from e
        except LlamamemError:
            os.close(self._fd)
            raise

    def __enter__(self) -> ResultsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)

    def append(self, answer: Answer) -> None:
        data = json.dumps(answer.model_dump(mode="json")).encode() + b"\n"
        try:
            while data:
                data = data[os.write(self._fd, data) :]
        except OSError as e:
            raise LlamamemError(f"--output {self.path}: cannot be written ({e.strerror}); make room, run again") from e


def _parse(path: Path, data: bytes) -> tuple[dict[str, Answer], int]:
    """Answers by id, and the bytes of whole lines."""
    whole = data.rfind(b"\n") + 1
    torn = data[whole:]
    if not (torn.startswith(_HEAD) or _HEAD.startswith(torn)):
        raise LlamamemError(f"{path}: its last line is not an answer of `llamamem eval`; give another file")
    answers: dict[str, Answer] = {}
    for number, line in enumerate(data[:whole].split(b"\n")[:-1], 1):
        try:
            if not line.startswith(_HEAD):
                raise ValueError("it begins differently")
            answer = Answer.model_validate_json(line)
        except (ValidationError, ValueError) as e:
            said = e.errors()[0]["msg"] if isinstance(e, ValidationError) else str(e)
            raise LlamamemError(
                f"{path}: line {number} is not an answer of `llamamem eval` ({said}); give another file"
            ) from e
        answers[answer.id] = answer
    return answers, whole
