"""Regular files: a pipe, a device or a directory in the place of one is refused, and nobody waits for it."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO


class NotRegular(OSError):
    """What stands there is no file: a pipe, a device, a socket."""


def open_regular(path: str | Path) -> BinaryIO:
    """Opens a file to read its bytes. Raises OSError, also for what is no file: with a text for that, and at once."""
    # a pipe without a writer is opened only by who says that it will not wait
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        mode = os.fstat(fd).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise NotRegular(errno.EINVAL, "not a regular file", str(path))
        return os.fdopen(fd, "rb")
    except BaseException:
        os.close(fd)
        raise


def read_regular(path: str | Path, most: int) -> bytes:
    """All of a file that has at most so many bytes. Raises OSError, of a larger one before anything is read."""
    with open_regular(path) as file:
        data = file.read(most + 1) if os.fstat(file.fileno()).st_size <= most else None
    if data is None or len(data) > most:
        raise OSError(errno.EFBIG, f"has over {most} bytes", str(path))
    return data
