"""Both readers on many files, under limits: a program, as limits are for the life of a process.

    python bounded_readers.py MIB SECONDS < paths, one a line

MIB of memory and SECONDS of processor time more than it has when both readers are there, and no byte may be written to
a file. Prints one line of JSON for each path: what the first reader says and the second, null where the file loads; and
the figures at the end: MiB that were taken at most, seconds, and the slowest path of each.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

from llamamem.formats.sidecar import validate_sidecar
from llamamem.native.runtime import load_library, loader_refusal


def main() -> None:
    """Reads the paths, all of them before the limits are set."""
    mib, seconds = map(int, sys.argv[1:])
    paths = [Path(line) for line in sys.stdin.read().splitlines()]
    load_library()
    for path in paths[:1]:  # what is made at the first call only is not the file's
        validate_sidecar(path), loader_refusal(path)
    before, start = _status("VmSize"), time.process_time()
    resource.setrlimit(resource.RLIMIT_AS, (before + (mib << 20),) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (int(start) + seconds + 1,) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    for path in paths:
        times = [time.process_time()]
        found = [f.reason for f in validate_sidecar(path).findings[:1]]
        times.append(time.process_time())
        refusal = loader_refusal(path)
        times.append(time.process_time())
        print(json.dumps([found[0] if found else None, refusal, times[1] - times[0], times[2] - times[1]]))
    used = {"mib": (_status("VmPeak") - before) / 2**20, "seconds": time.process_time() - start}
    print(json.dumps(used))


def _status(field: str) -> int:
    """Bytes, of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    main()
