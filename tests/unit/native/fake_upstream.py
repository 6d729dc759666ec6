"""A tiny upstream in an sdist of its own: what the pin, patch and build tests work on."""

from __future__ import annotations

import hashlib
import io
import subprocess
import tarfile
from pathlib import Path

UPSTREAM = {
    "README.md": "upstream\n",
    ".gitignore": "*.log\n/build*\n",
    "src/core.cpp": "".join(f"int line_{n};\n" for n in range(20)),
    "src/other.cpp": "int other;\n",
    "kept.log": "a file that upstream's .gitignore hides\n",
    "crlf.txt": "one\r\ntwo\r\n",
    "run.sh": "#!/bin/sh\n",
}


def git(tree: Path, *args: str) -> str:
    command = ["git", "-c", "user.name=someone", "-c", "user.email=someone@localhost", "-C", str(tree), *args]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def write_sdist(path: Path, files: dict[str, str], links: dict[str, str] | None = None) -> str:
    """An sdist as the real one: upstream's tree inside, with the link file of a git submodule. Returns its SHA-256."""
    with tarfile.open(path, "w:gz") as archive:
        for name, text in {**files, ".git": "gitdir: ../nowhere\n"}.items():
            member = tarfile.TarInfo(f"pkg-1.0/vendor/up/{name}")
            data = text.encode()
            member.size, member.mtime, member.mode = len(data), 1, 0o775 if name.endswith(".sh") else 0o664
            archive.addfile(member, io.BytesIO(data))
        for name, target in (links or {}).items():
            member = tarfile.TarInfo(f"pkg-1.0/vendor/up/{name}")
            member.type, member.linkname = tarfile.SYMTYPE, target
            archive.addfile(member)
        outside = tarfile.TarInfo("pkg-1.0/setup.py")
        archive.addfile(outside, io.BytesIO(b""))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def edit(tree: Path, name: str, old: str, new: str) -> None:
    path = tree / name
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
