"""A suite: prompts to put to a model, and what is expected of the answers.

JSON Lines: one object a line with `id` and either `prompt` (one user's turn) or `messages` (a conversation that ends
with one), and optionally `expect`, `group` and `max_tokens`. Or plain text: one prompt a line, called `line-<number>`.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import jsonschema
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from llamamem.errors import LlamamemError
from llamamem.formats.validation import first_fault

Texts = Annotated[tuple[str, ...], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]


class _Closed(BaseModel):
    """A misspelt field would be a check that is never made."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Message(_Closed):
    role: Literal["system", "user", "assistant"]
    content: str


class Expect(_Closed):
    """All that is given must hold. White space around an answer does not count; `ignore_case` is for all but schemas.

    exact:         the answer is this text.
    contains:      each of these (one text or a list) is in it; `not_contains`: none of them.
    regex:         Python's, found anywhere in the answer.
    json_schema:   the whole answer is JSON that this schema allows.
    """

    exact: str | None = None
    contains: Texts = ()
    not_contains: Texts = ()
    regex: str | None = None
    json_schema: dict[str, Any] | None = None
    ignore_case: bool = False

    @field_validator("regex")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as e:
            raise ValueError(f"not a regular expression ({e})") from None
        return value

    @field_validator("json_schema")
    @classmethod
    def _is_a_schema(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        try:
            jsonschema.validators.validator_for(value or {}).check_schema(value or {})
        except jsonschema.SchemaError as e:
            raise ValueError(f"not a JSON schema: {e.json_path}: {e.message}") from None
        return value

    @model_validator(mode="after")
    def _checks_something(self) -> Expect:
        alone = (self.exact, self.regex, self.json_schema)
        if not self.contains and not self.not_contains and all(value is None for value in alone):
            raise ValueError("checks nothing; give exact, contains, not_contains, regex or json_schema")
        return self


class Line(_Closed):
    """One prompt. `group` is what the summary counts it under; `max_tokens` goes before the command line's."""

    id: str = Field(min_length=1, max_length=200)
    prompt: str | None = Field(default=None, min_length=1)
    messages: tuple[Message, ...] | None = Field(default=None, min_length=1)
    expect: Expect | None = None
    group: str | None = None
    max_tokens: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _one_question(self) -> Line:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        if self.messages is not None and self.messages[-1].role != "user":
            raise ValueError(f"messages: the last one is the {self.messages[-1].role}'s; a question is the user's")
        return self

    def conversation(self, system: str | None = None) -> list[dict[str, str]]:
        """As the server wants it. `system` is put first unless the line has a system message of its own."""
        said = self.messages or (Message(role="user", content=self.prompt or ""),)
        if system is not None and said[0].role != "system":
            said = (Message(role="system", content=system), *said)
        return [message.model_dump() for message in said]


class Suite(BaseModel):
    """`sha256` is that of the file."""

    model_config = ConfigDict(frozen=True)

    path: str
    sha256: str
    lines: tuple[Line, ...]

    def first(self, n: int | None) -> Suite:
        return self.model_copy(update={"lines": self.lines[:n]})


def read_suite(path: Path) -> Suite:
    """JSON Lines if the name ends in .jsonl, or the first line begins with `{` and the name does not end in .txt.

    Raises LlamamemError with the line and the field at fault.
    """
    try:
        data = path.read_bytes()
        rows = data.decode("utf-8-sig").split("\n")
    except OSError as e:
        raise LlamamemError(f"suite {path}: cannot be read ({e.strerror}); give JSON Lines or plain text") from e
    except UnicodeDecodeError as e:
        raise LlamamemError(f"suite {path}: byte {e.start} is not UTF-8; save it as UTF-8") from e
    written = [(number, row.rstrip("\r")) for number, row in enumerate(rows, 1) if row.strip()]
    if not written:
        raise LlamamemError(f"suite {path}: is empty; write one prompt a line")
    suffix = path.suffix.lower()
    as_json = suffix == ".jsonl" or (suffix != ".txt" and written[0][1].lstrip().startswith("{"))
    lines: dict[str, tuple[int, Line]] = {}
    for number, row in written:
        line = _line(path, number, row) if as_json else Line(id=f"line-{number}", prompt=row)
        if line.id in lines:
            raise LlamamemError(
                f"suite {path}: line {number}: id {line.id!r} is that of line {lines[line.id][0]}; give each its own"
            )
        lines[line.id] = (number, line)
    found = tuple(line for _, line in lines.values())
    return Suite(path=str(path), sha256=hashlib.sha256(data).hexdigest(), lines=found)


def _line(path: Path, number: int, row: str) -> Line:
    try:
        return Line.model_validate_json(row)
    except ValidationError as e:
        raise LlamamemError(
            f"suite {path}: line {number}: {first_fault(e)}; a line has id, prompt or messages, and"
            " may have expect, group, max_tokens"
        ) from e
