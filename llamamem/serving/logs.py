"""The log of a recorded run, as it is or as it grows."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from llamamem.errors import LlamamemError
from llamamem.formats.run import RunRecord
from llamamem.serving.runs import is_alive

_POLL = 0.1  # seconds


def read_log(record: RunRecord, *, follow: bool = False, lines: int | None = None) -> Iterator[str]:
    """Pieces of text: all of it, or the last `lines`; with `follow` also what comes, until the server has ended.

    Raises LlamamemError when the log is gone.
    """
    try:
        with Path(record.log).open("r", encoding="utf-8", errors="replace") as file:
            if lines is None:
                yield from file
            else:
                yield from deque(file, maxlen=lines)
            while follow:
                over = not is_alive(record)  # asked first: what it wrote last is read after that
                yield from file
                if over:
                    return
                time.sleep(_POLL)
    except OSError as e:
        raise LlamamemError(f"{record.log}: the log of {record.name} cannot be read ({e.strerror})") from e
