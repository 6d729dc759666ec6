"""A conversation to be held with two runtimes at once: what is said, and what is done to the memory in between.

JSON: `{"format": "llamamem_conversation.v1", "steps": [...]}`, where a step has one of the members of `Step`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from llamamem.errors import LlamamemError
from llamamem.formats.validation import first_fault

_ACTS = ("say", "reset", "save", "resume", "park")


class Step(BaseModel):
    """One thing to do, by the member that it has.

    `say`: a user's turn, answered greedily with at most `max_new_tokens`. `reset`: text and memory are gone.
    `save`: the memory alone goes to a file of that name. `resume`: the text is gone, and the next one starts on the
    memory of that name. `park`: text, KV cache and memory are saved, dropped and restored.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    say: str | None = Field(default=None, min_length=1)
    max_new_tokens: int = Field(default=16, ge=1)
    reset: Literal[True] | None = None
    save: str | None = Field(default=None, pattern="^[a-z0-9_-]{1,40}$")
    resume: str | None = Field(default=None, pattern="^[a-z0-9_-]{1,40}$")
    park: Literal[True] | None = None

    @model_validator(mode="after")
    def _one_act(self) -> Step:
        if len(self.model_fields_set & set(_ACTS)) != 1:
            raise ValueError(f"a step has one of {', '.join(_ACTS)}")
        return self

    @property
    def act(self) -> str:
        return next(act for act in _ACTS if act in self.model_fields_set)

    def __str__(self) -> str:
        detail = getattr(self, self.act)
        return self.act if detail is True else f"{self.act} {detail}"


class Script(BaseModel):
    """The steps in their order; what is resumed was saved before."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["llamamem_conversation.v1"] = "llamamem_conversation.v1"
    steps: tuple[Step, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _resumable(self) -> Script:
        saved: set[str] = set()
        for i, step in enumerate(self.steps):
            if step.save is not None:
                saved.add(step.save)
            if step.resume is not None and step.resume not in saved:
                raise ValueError(f"step {i} resumes {step.resume!r}, which no step before it saves")
        return self


def read_script(path: Path) -> Script:
    """Raises LlamamemError with the file and the field at fault."""
    try:
        return Script.model_validate_json(path.read_bytes())
    except OSError as e:
        raise LlamamemError(f"conversation {path}: cannot be read ({e.strerror})") from e
    except ValidationError as e:
        raise LlamamemError(f"conversation {path}: {first_fault(e)}") from e
