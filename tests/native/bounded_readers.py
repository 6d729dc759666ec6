"""The readers of sidecars on many files, each file in a process under limits of its own.

    python bounded_readers.py < LINES

A line of stdin is a JSON list: a path, and the MiB of memory and the seconds of processor time that reading it may take
beyond what the loaded readers have; not a byte may be written to a file. A line of stdout answers each: for what reason
read_sidecar, validate_sidecar and the runtime refuse the file (null: it loads), or how the process ended instead.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path

from llamamem.errors import LlamamemError
from llamamem.formats.sidecar import read_sidecar, validate_sidecar
from llamamem.native.runtime import load_library, loader_refusal

SOUND = Path(__file__).parents[1] / "data" / "hostile" / "sound-v1.gguf"


def main() -> None:
    """A fork has the libraries and all that is made at the first call only: none of it is counted as a file's."""
    load_library()
    assert _reasons(SOUND) == [None] * 3
    for line in sys.stdin:
        path, mib, seconds = json.loads(line)
        end, start = os.pipe()
        child = os.fork()
        if child == 0:
            _answer(Path(path), mib, seconds, start)
        os.close(start)
        with open(end, encoding="utf-8") as pipe:
            said = pipe.read()
        _, status = os.waitpid(child, 0)
        ended = os.waitstatus_to_exitcode(status)
        print(said if ended == 0 else json.dumps(f"ended with {ended} {said}"), flush=True)


def _answer(path: Path, mib: int, seconds: int, to: int) -> None:
    status = 1
    try:
        memory = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + (mib << 20)
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))  # SIGXCPU, a second later SIGKILL
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        os.write(to, json.dumps(_reasons(path)).encode())
        status = 0
    except BaseException as e:
        os.write(to, repr(e).encode())
    finally:
        os._exit(status)


def _reasons(path: Path) -> list[str | None]:
    try:
        read_sidecar(path)
        first = None
    except LlamamemError as e:
        first = e.reason
    findings = validate_sidecar(path).findings
    refusal = loader_refusal(path)
    runtime = None if refusal is None else refusal.removeprefix(f"sidecar '{path}': [").partition("]")[0]
    return [first, findings[0].reason if findings else None, runtime]


if __name__ == "__main__":
    main()
