"""Why a sidecar is refused: the reasons, and how a reader comes to have all of them or only the first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from llamamem.errors import LlamamemError

P = ParamSpec("P")
T = TypeVar("T")

# in the order of docs/sidecar.md, with the meaning in short
REASONS = {
    "unreadable": "the file cannot be opened or read",
    "too-large": "the file is over 1 GiB",
    "not-gguf": "the file is not GGUF",
    "gguf-version": "the file is GGUF of another version than 3",
    "gguf-count": "the file says that it has more keys or tensors than a sidecar can have",
    "truncated": "the file is cut short, or a length in it is wrong",
    "not-utf8": "a text of the file is not UTF-8",
    "key-duplicate": "a key stands twice",
    "gguf-type": "a key has a type that GGUF does not have",
    "not-a-sidecar": "the file is GGUF, but not a sidecar",
    "alignment": "the tensors are not aligned to 32 bytes",
    "tensor-name": "a tensor's name is empty or over 63 bytes",
    "tensor-duplicate": "a tensor stands twice",
    "tensor-dims": "a tensor has an impossible shape",
    "tensor-type": "a tensor is not BF16, F16 or F32",
    "tensor-offset": "a tensor does not begin where the one before it ends",
    "trailing-bytes": "the file goes on after its last tensor",
    "key-missing": "a key is missing",
    "key-type": "a key has another type",
    "format-version": "the file is of a version of the format that is not known",
    "schema": "the schema is not that of the format's version",
    "semantics-version": "the memory's semantics are of a version that is not known",
    "unsupported": "a key names something that is not implemented",
    "key-unknown": "a key is not known, so it may change the maths",
    "key-value": "a key's value is impossible",
    "json-size": "a JSON text is over 16 MiB",
    "json-depth": "a JSON text is nested too deeply",
    "json-invalid": "a JSON text is not valid",
    "json-duplicate": "a JSON text names a member twice",
    "json-type": "a JSON text is not the object or list that it must be",
    "config-unknown": "the configuration has a member that is not known, so it may change the maths",
    "config-unsupported": "the configuration asks for something that is not implemented",
    "config-missing": "the configuration lacks a member",
    "config-value": "a member of the configuration has an impossible value",
    "disagree": "two parts of the file contradict each other",
    "attention": "the description of a layer's attention is impossible",
    "manifest": "the tensor manifest is not that of the tensors",
    "tensor-missing": "a tensor is missing",
    "tensor-shape": "a tensor has another shape",
    "tensor-hash": "a tensor's bytes are not those that were exported",
    "tensor-nonfinite": "a tensor holds a NaN or an infinity",
    "tensor-inactive": "a tensor of a delta head that is not active is not zero",
    "tensor-unknown": "a tensor has no place in the memory, so it may change the maths",
    "base-architecture": "the base is of another architecture than the sidecar was made for",
    "base-split": "the base is split into several files, and not all of them are there",
    "base-shape": "the base has other layers or widths than the sidecar was made for",
    "base-rows": "the base has its rows of q and k in another order than the sidecar's deltas",
    "base-heads": "the base has no projection of its own for a delta of k or v",
    "base-hash": "the base is not the file that the sidecar was made for",
}

MAX_FINDINGS = 1000  # a hostile file may have a fault in every one of a million entries


@dataclass(frozen=True)
class Finding:
    """One fault: a code of REASONS, and a line that names the key, member or tensor, without the file."""

    reason: str
    message: str


class Enough(Exception):
    """As many findings as were asked for."""


class Findings:
    """Faults in the order in which they are found; ends the checks with Enough when there are `limit` of them."""

    def __init__(self, limit: int = MAX_FINDINGS) -> None:
        self.limit = limit
        self.found: list[Finding] = []

    def add(self, fault: LlamamemError) -> None:
        """Records a refusal. An error without a reason is none of the file's: it is raised."""
        if fault.reason is None:
            raise fault
        self.found.append(Finding(fault.reason, str(fault)))
        if len(self.found) >= self.limit:
            raise Enough

    def attempt(self, check: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """What a check returns; None when it refused, so that what depends on it can be left out."""
        try:
            return check(*args, **kwargs)
        except LlamamemError as fault:
            self.add(fault)
            return None


def quoted(text: str) -> str:
    """Untrusted text for a message: printable, at most 80 characters, in quotes."""
    short = "".join(c if c.isprintable() and c != "'" else "?" for c in text[:80])
    return f"'{short}...'" if len(text) > 80 else f"'{short}'"
