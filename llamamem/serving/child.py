"""What the kernel is asked of a child process: to die with its launcher, to be signalled."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1


def die_with(launcher: int) -> Callable[[], None] | None:
    """For the child between fork and exec: SIGKILL me when my parent dies. Linux only: no such call elsewhere."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)  # looked up before the fork: nothing may be loaded after it

    def apply() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != launcher:  # it died in between
            os._exit(127)

    return apply


def terminate(pid: int) -> None:
    """SIGTERM for llama-server, in a thread that is not its main one.

    Its handler locks the mutex of the task queue. The main thread holds that for a moment with each token, and a
    handler that interrupts it there waits for ever; on a small model about one stop in five while it generates did.
    The first other thread is that of its log, which has no part in the queue. To be dropped, for a signal to the group,
    when upstream's handler takes no lock.
    """
    with contextlib.suppress(OSError, AttributeError, ValueError):
        threads = sorted(int(name) for name in os.listdir(f"/proc/{pid}/task"))
        others = [thread for thread in threads if thread != pid]
        if others and ctypes.CDLL(None).tgkill(pid, others[0], int(signal.SIGTERM)) == 0:
            return
    signal_group(pid, signal.SIGTERM)


def signal_group(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, number)
