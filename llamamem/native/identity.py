"""Who a build is: the upstream commit and a hash of everything that is laid over it.

Standard library only: CMake runs this before any dependency is installed.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from llamamem.errors import LlamamemError

__all__ = ["EDITED", "Pin", "build_identity", "patch_set_sha256", "read_pin", "series_names", "source_root"]

EDITED = "-edited"  # suffix of a build whose tree had edits that no patch holds
LOCK = Path("vendor") / "llama.cpp.lock"


@dataclass(frozen=True)
class Pin:
    """`vendor/llama.cpp.lock`: which upstream, and which trees it must give (git tree hashes, 40 hex digits)."""

    requirement: str
    sha256: str
    subdirectory: str
    upstream_commit: str
    pristine_tree: str
    patched_tree: str


def source_root() -> Path:
    """Where `CMakeLists.txt`, `patches/` and `vendor/llama.cpp.lock` are: the checkout, or the copy in a wheel."""
    package = Path(__file__).resolve().parents[1]
    for root in (package.parent, package / "native" / "_source"):
        if (root / LOCK).is_file() and (root / "CMakeLists.txt").is_file():
            return root
    raise LlamamemError(
        f"{package} has neither a checkout around it nor the native sources inside it: "
        "install llamamem from its checkout or wheel"
    )


def read_pin(root: Path) -> Pin:
    path = root / LOCK
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return Pin(**{name: str(data[name]) for name in Pin.__dataclass_fields__})
    except OSError as error:
        raise LlamamemError(f"{path}: cannot be read ({error.strerror}): restore it from git") from None
    except (ValueError, TypeError) as error:
        raise LlamamemError(f"{path}: not a JSON object ({error}): restore it from git") from None
    except KeyError as error:
        raise LlamamemError(f"{path}: has no field {error}: restore it from git") from None


def series_names(patches: Path) -> list[str]:
    """File names in `patches/series`, in order; blank lines and `#` comments are skipped."""
    path = patches / "series"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise LlamamemError(f"{path}: cannot be read ({error.strerror}): restore it from git") from None
    names = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    for name in names:
        if not (patches / name).is_file():
            raise LlamamemError(f"{path}: names {name}, which is not in {patches}: restore it or take the line out")
    return names


def patch_set_sha256(root: Path) -> str:
    """SHA-256 over `series`, each patch in series order, then the files of `patches/src` sorted by path.

    Each file adds its path below `patches/` (utf-8, `/`), a zero byte, its length in decimal, a zero byte, its bytes.
    """
    patches = root / "patches"
    sources = [path.relative_to(patches).as_posix() for path in (patches / "src").rglob("*") if path.is_file()]
    kept = sorted(name for name in sources if not any(part.startswith(".") for part in name.split("/")))
    digest = hashlib.sha256()
    for name in ["series", *series_names(patches), *kept]:
        data = (patches / name).read_bytes()
        digest.update(name.encode() + b"\0" + str(len(data)).encode() + b"\0" + data)
    return digest.hexdigest()


def build_identity(root: Path | None = None) -> str:
    """`<upstream commit, 9 hex>+<patch set, 12 hex>`: what `llama-server --version` and `/props` of a build report."""
    root = root or source_root()
    return f"{read_pin(root).upstream_commit[:9]}+{patch_set_sha256(root)[:12]}"
