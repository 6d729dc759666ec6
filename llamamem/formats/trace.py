"""A reference trace: what an independent runtime answered to one prompt, and the tokens that it went through.

JSON, schema `delta_mem_rwkv_ms_reference_trace.v1`. Only the fields below are read; whatever else a recorder wrote is
kept on the models as it was.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from llamamem.errors import LlamamemError
from llamamem.formats.validation import first_fault

SCHEMA = "delta_mem_rwkv_ms_reference_trace.v1"


def _one_row(value: Any) -> Any:
    """A recorder that wrote its tensor as it was has a batch axis of one."""
    return value[0] if isinstance(value, list) and len(value) == 1 and isinstance(value[0], list) else value


TokenIds = Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(_one_row)]


class _Open(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)


class Generation(_Open):
    """How the answer was made. The prompt is a user's turn, before the chat template."""

    prompt: str = Field(min_length=1)
    max_new_tokens: int = Field(ge=1)
    do_sample: bool = False
    sample_seed: int | None = None
    temperature: float | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, ge=0, le=1)
    top_k: int | None = Field(default=None, ge=0)

    @property
    def greedy(self) -> bool:
        return not self.do_sample or self.temperature == 0 or self.top_k == 1


class Result(_Open):
    """`assistant_display`: the answer as a user saw it, without special tokens."""

    assistant_display: str


class Session(_Open):
    """`processed_input_ids`: every token that went through the model, the prompt's first. None when not recorded."""

    processed_input_ids: TokenIds | None = None


class Trace(_Open):
    generation: Generation
    result: Result
    session: Session = Session()

    @model_validator(mode="before")
    @classmethod
    def _is_ours(cls, value: Any) -> Any:
        # the schema gives its name, not the key that carries it
        named = [
            value[key] for key in ("schema", "schema_version", "format") if isinstance(value, dict) and key in value
        ]
        if named and SCHEMA not in named:
            raise ValueError(f"this is a {named[0]!r}, not a {SCHEMA!r}")
        return value


def read_trace(path: Path) -> Trace:
    """Raises LlamamemError with the file and the field at fault."""
    try:
        return Trace.model_validate_json(path.read_bytes())
    except OSError as e:
        raise LlamamemError(f"trace {path}: cannot be read ({e.strerror}); give a {SCHEMA} file") from e
    except ValidationError as e:
        raise LlamamemError(f"trace {path}: {first_fault(e)}; record it again as {SCHEMA}") from e
