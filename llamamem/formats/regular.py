"""Regular files alone: a FIFO would be waited for without an end, and a device read without one."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO


def open_regular(path: Path, *, or_device: bool = False) -> BinaryIO:
    """For reading. Raises OSError for anything that is not a file, before a byte of it is read.

    `or_device` is for who reads no more than a bound of it.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        mode = os.fstat(fd).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not (stat.S_ISREG(mode) or (or_device and stat.S_ISCHR(mode))):
            raise OSError(errno.EINVAL, "it is not a file", str(path))
        return os.fdopen(fd, "rb")
    except BaseException:
        os.close(fd)
        raise
