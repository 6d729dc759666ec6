"""The gateway's log: a line of JSON an event, of who, what, how long; never a text, a key, a session's name."""

from __future__ import annotations

import hashlib
import json
import sys
import threading
import time
from typing import Any, TextIO

_lock = threading.Lock()


class Log:
    """`Log()` writes to standard error. `session` in a line is a hash that only who knows the name can compare."""

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = out or sys.stderr

    def __call__(self, event: str, **fields: Any) -> None:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime()) + f".{int(time.time() * 1000) % 1000:03d}Z"
        line = json.dumps({"time": stamp, "event": event} | {k: v for k, v in fields.items() if v is not None})
        with _lock:
            try:
                self._out.write(line + "\n")
                self._out.flush()
            except (OSError, ValueError):  # a closed terminal is no reason to end
                pass


def hashed_name(namespace: str, name: str) -> str:
    return hashlib.sha256(f"{namespace}/{name}".encode()).hexdigest()[:12]
