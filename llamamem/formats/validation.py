"""What pydantic says of a file, in one line."""

from __future__ import annotations

from pydantic import ValidationError


def first_fault(error: ValidationError) -> str:
    """`field: what is wrong with it`, of the first fault; of a file that is no JSON, "the file"."""
    fault = error.errors()[0]
    field = ".".join(str(part) for part in fault["loc"]) or "the file"
    return f"{field}: {fault['msg'].removeprefix('Value error, ')}"
