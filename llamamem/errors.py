"""The one exception that users see: its text is a single line, never a traceback."""

from __future__ import annotations


class LlamamemError(Exception):
    """What went wrong and what to do next, in one line that names the file, flag, key or tensor at fault.

    `exit_status` is what the command line exits with: 2 means "could not run", 1 "the check failed".
    `reason` is a code of docs/sidecar.md when a sidecar, or the base for it, was refused.
    """

    exit_status = 2

    def __init__(self, message: str, *, exit_status: int = 2, reason: str | None = None) -> None:
        super().__init__(" ".join(message.split()))
        self.exit_status = exit_status
        self.reason = reason
