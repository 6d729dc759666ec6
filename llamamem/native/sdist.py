"""Fetch the pinned sdist by hash and unpack upstream's tree out of it. Standard library only."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

from llamamem.errors import LlamamemError
from llamamem.native.identity import Pin

__all__ = ["cache_dir", "fetch_sdist", "unpack"]


def cache_dir() -> Path:
    """Where downloads, and builds outside a checkout, are kept: `LLAMAMEM_CACHE_DIR`, else the user's cache."""
    if own := os.environ.get("LLAMAMEM_CACHE_DIR"):
        return Path(own).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "llamamem"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llamamem"


def fetch_sdist(pin: Pin) -> Path:
    """The pinned sdist: `LLAMAMEM_SDIST` if set, else from the cache, else downloaded by pip, which checks the hash."""
    if given := os.environ.get("LLAMAMEM_SDIST"):
        path = Path(given).expanduser()
        if not path.is_file():
            raise LlamamemError(f"LLAMAMEM_SDIST={given}: no such file: unset it to download {pin.requirement}")
        if (found := _sha256(path)) != pin.sha256:
            raise LlamamemError(f"LLAMAMEM_SDIST={given}: SHA-256 is {found}, the lock file wants {pin.sha256}")
        return path
    path = cache_dir() / "sdists" / f"{pin.sha256}.tar.gz"
    if path.is_file() and _sha256(path) == pin.sha256:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        os.replace(_download(pin, Path(scratch)), path)
    return path


def _download(pin: Pin, scratch: Path) -> Path:
    wanted = scratch / "requirement.txt"
    wanted.write_text(f"{pin.requirement} --hash=sha256:{pin.sha256}\n", encoding="utf-8")
    files = scratch / "files"
    command = [sys.executable, "-m", "pip", "download", "--require-hashes", "--no-deps", "--no-binary", ":all:"]
    # pip asks the sdist's build backend for its metadata: only this one package may come as source, its backend
    # as wheels, and nothing of it is compiled. An isolated build puts a PYTHONPATH before the one that has pip.
    command[-1] = pin.requirement.partition("==")[0]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(files), "--requirement", str(wanted)]
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "CMAKE_ARGS")}
    print(f"llamamem: downloading {pin.requirement} (its sdist holds the pinned llama.cpp)", file=sys.stderr)
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    found = list(files.glob("*.tar.gz")) if files.is_dir() else []
    if done.returncode or len(found) != 1:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        reason = next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "pip said nothing")
        raise LlamamemError(
            f"cannot download {pin.requirement}: {reason.strip()} (check the network and pip's index settings, "
            "or set LLAMAMEM_SDIST to a copy of the sdist)"
        )
    return found[0]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def unpack(sdist: Path, subdirectory: str, target: Path) -> None:
    """Write `<top>/<subdirectory>/**` of `sdist` to `target`, which must not exist.

    Plain files alone are taken, with the mode git would give them. File times are those of the unpacking, not the
    archive's: a build decides by them what to compile again. A `.git` of upstream's is left out: it is a submodule's
    link file that points nowhere, and CMake's dependency on it never comes to rest.
    """
    prefix = PurePosixPath(subdirectory).parts
    target.mkdir(parents=True)
    count = 0
    with tarfile.open(sdist, "r:gz") as archive:
        for member in archive:
            parts = PurePosixPath(member.name).parts
            if parts[1 : 1 + len(prefix)] != prefix or len(parts) == 1 + len(prefix):
                continue
            inner = parts[1 + len(prefix) :]
            if inner[0] == ".git" or member.isdir():
                continue
            if not member.isfile() or ".." in inner or member.name.startswith("/"):
                raise LlamamemError(f"{sdist}: {member.name} is not a plain file below {subdirectory}: not unpacked")
            source = archive.extractfile(member)
            assert source is not None  # a regular file, checked above
            path = target.joinpath(*inner)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("xb") as file:
                shutil.copyfileobj(source, file)
            path.chmod(0o755 if member.mode & 0o100 else 0o644)
            count += 1
    if not count:
        raise LlamamemError(f"{sdist}: has nothing below {subdirectory}: not the sdist that the lock file means")
