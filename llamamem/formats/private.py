"""Files and directories for their owner alone: what somebody said may be read out of a memory."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path


def private_directory(path: Path) -> None:
    """Makes it, or takes from one that is there what others may do in it.

    A home, another user's and one with the sticky bit, as /tmp has it, are left as they are: they are for more.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.stat()
    ours = found.st_uid == os.geteuid() and not found.st_mode & stat.S_ISVTX and path.resolve() != Path.home()
    if ours and found.st_mode & 0o077:
        path.chmod(stat.S_IMODE(found.st_mode) & 0o700)


def replace_private(path: str | Path, data: bytes, *, flush_folder: bool = True) -> None:
    """Writes beside the target, flushes and renames. The caller keeps other writers of this target away.

    Without `flush_folder` the new name may be lost with the machine: until the next flush of the folder, which keeps
    the order of what is renamed and linked in it.
    """
    folder, name = os.path.split(path)
    part = os.path.join(folder, f".{name}.part")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    try:
        try:
            fd = os.open(part, flags, 0o600)
        except FileExistsError:  # what a crash left, or a link that somebody laid there: nothing is written through it
            os.unlink(part)
            fd = os.open(part, flags, 0o600)
        try:
            left = memoryview(data)
            while left:
                left = left[os.write(fd, left) :]
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(part, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(part)
        raise
    if flush_folder:
        flush_directory(folder or ".")


def flush_directory(path: str | Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
