"""What a command finds around it: streams that may be closed or full, a terminal's encoding, a home that is none."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import tempfile
from pathlib import Path

_LOST = {errno.ENOSPC: "no room is left", errno.EDQUOT: "the quota is used up", errno.EBADF: "it is closed"}


def prepare() -> None:
    """Before anything is written or looked for."""
    _open_streams()
    _find_home()


def _open_streams() -> None:
    """Closed ones are opened on nothing: the next file would get their number, and be written into."""
    while (fd := os.open(os.devnull, os.O_RDWR)) < 3:
        continue
    os.close(fd)
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a name that the terminal cannot show is no reason to fail
            stream.reconfigure(errors="backslashreplace")


def _find_home() -> None:
    """For a user of a container that has no home, or `/`, which is not its own: a private directory for temporary ones.

    What is to be kept belongs into a volume, which XDG_STATE_HOME and XDG_DATA_HOME name.
    """
    home = os.path.expanduser("~")
    if not hasattr(os, "getuid") or home not in ("~", "/", "/nonexistent") or os.access(home, os.W_OK):
        return
    if home == "~":
        os.environ["HOME"] = "/nonexistent"  # or what is meant for it would go to a directory named `~`
    with contextlib.suppress(OSError):  # whoever needs it says what it cannot write
        own = Path(tempfile.gettempdir()) / f"llamamem-{os.getuid()}"
        own.mkdir(mode=0o700, exist_ok=True)
        found = own.lstat()
        if found.st_uid == os.getuid() and not own.is_symlink() and not found.st_mode & 0o077:
            os.environ["HOME"] = str(own)


def is_nowhere() -> bool:
    """Whether the current directory was removed: no path that is not absolute means anything then."""
    try:
        os.getcwd()
    except OSError:
        return True
    return False


def flush(status: int) -> int:
    """The exit status, once all of it is written: at the end nobody catches what a flush raises."""
    try:
        sys.stdout.flush()
    except OSError as error:
        lost = lost_output(error)
        return status if lost is None else lost
    return status


def lost_output(error: OSError) -> int | None:
    """The exit status for output that could not be written, after saying so; None when it is another error."""
    if isinstance(error, BrokenPipeError):  # `llamamem ... | head`: nobody reads on
        _drop_output()
        return 0
    if error.errno not in _LOST or error.filename is not None:
        return None
    _drop_output()
    with contextlib.suppress(OSError):
        print(f"llamamem: error: the output cannot be written: {_LOST[error.errno]}", file=sys.stderr, flush=True)
    return 2


def _drop_output() -> None:
    """What still waits to be written must not be tried again when Python ends."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
