"""SHA-256 of big files, remembered for as long as a file stays what it is."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import filelock
import platformdirs

from llamamem.errors import LlamamemError
from llamamem.formats import base
from llamamem.formats.gguf_file import read_gguf_index

Progress = Callable[[int, int], None]  # bytes done, bytes in all

_REMEMBERED = 256  # files; the oldest is forgotten first


def file_sha256(path: Path, progress: Progress | None = None) -> str:
    """SHA-256 in hex. Remembered under the cache directory for as long as device, inode, size and mtime stay.

    Raises LlamamemError when the file cannot be read, or is written to while it is read.
    """
    return _sha256([path], progress)


def base_sha256(path: Path, progress: Progress | None = None) -> str:
    """The same of a base, which may be split into several files."""
    return _sha256(base.base_files(read_gguf_index(path)), progress)


def _sha256(paths: list[Path], progress: Progress | None) -> str:
    key, size = _key(paths)
    cache = Path(platformdirs.user_cache_path("llamamem", appauthor=False)) / "digests.json"
    if (known := _read(cache).get(key)) is not None:
        return known
    done = 0

    def count(n: int) -> None:
        nonlocal done
        done += n
        if progress is not None:
            progress(done, size)

    digest = base.file_sha256(*paths, progress=count)
    if _key(paths)[0] != key:
        raise LlamamemError(f"{paths[0]}: was changed while it was hashed; wait until it is whole, then start again")
    with contextlib.suppress(OSError, filelock.Timeout):  # a cache that cannot be written costs time, nothing else
        _remember(cache, key, digest)
    return digest


def _key(paths: list[Path]) -> tuple[str, int]:
    """What the files are known by, links followed, and their size in bytes."""
    keys, size = [], 0
    for path in paths:
        try:
            stat = path.stat()
        except OSError as e:
            raise LlamamemError(f"{path}: cannot be read ({e.strerror})") from e
        keys.append(f"{stat.st_dev}:{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}")
        size += stat.st_size
    return "+".join(keys), size


def _remember(cache: Path, key: str, digest: str) -> None:
    cache.parent.mkdir(parents=True, exist_ok=True)
    temporary = cache.with_name(f".{cache.name}.{os.getpid()}")
    try:
        with filelock.FileLock(f"{cache}.lock", timeout=10):
            digests = dict([*_read(cache).items(), (key, digest)][-_REMEMBERED:])
            temporary.write_text(json.dumps(digests, indent=1), encoding="utf-8")
            os.replace(temporary, cache)
    finally:
        temporary.unlink(missing_ok=True)


def _read(cache: Path) -> dict[str, str]:
    try:
        digests = json.loads(cache.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(digests, dict):
        return {}
    return {key: value for key, value in digests.items() if isinstance(value, str) and len(value) == 64}
