"""How much of this machine is ours: processors and memory, as a container's limits and the affinity mask leave them.

The kernel shows a process in a container the whole machine, and llama.cpp counts its cores; threads that get no
processor spin, and make those wait that have one.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

__all__ = ["Processors", "available_memory", "processors"]


@dataclass(frozen=True)
class Processors:
    """`usable` is what this process may use of the machine's `online` ones, and `limit` what says so, if anything."""

    usable: int
    online: int
    limit: str | None


def processors(root: Path = Path("/")) -> Processors:
    """The affinity mask and the CPU quota, the smaller of both; a part of a processor counts as none but the first."""
    online = os.cpu_count() or 1
    usable, limit = online, None
    if hasattr(os, "sched_getaffinity") and (mask := len(os.sched_getaffinity(0))) < usable:
        usable, limit = mask, "the affinity mask"
    for quota in _quotas(root):
        if (whole := max(1, int(quota))) < usable:
            usable, limit = whole, f"the cgroup's quota of {quota:g} processors"
    return Processors(usable, online, limit)


def available_memory(root: Path = Path("/")) -> tuple[int, str]:
    """Bytes that can be had without swapping, and what counts them: the machine, or the cgroup's limit."""
    available, counted_by = psutil.virtual_memory().available, "are free"
    for folder, v2 in _folders("memory", root):
        limit = _number(folder / ("memory.max" if v2 else "memory.limit_in_bytes"))
        used = _number(folder / ("memory.current" if v2 else "memory.usage_in_bytes"))
        if limit is None or used is None:
            continue
        # files that were read and can be dropped again count as used: the model itself may be among them
        left = max(0, limit - used + _dropped(folder, "inactive_file" if v2 else "total_inactive_file"))
        if left < available:
            available, counted_by = left, "are left of the cgroup's limit"
    return available, counted_by


def _quotas(root: Path) -> Iterator[float]:
    for folder, v2 in _folders("cpu", root):
        with contextlib.suppress(OSError, ValueError):
            if v2:
                quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
            else:
                quota, period = ((folder / f"cpu.cfs_{name}_us").read_text(encoding="ascii") for name in _CFS)
            if (allowed := int(quota)) > 0 and int(period) > 0:  # "max" is no number, -1 no quota
                yield allowed / int(period)


_CFS = ("quota", "period")


def _folders(controller: str, root: Path) -> Iterator[tuple[Path, bool]]:
    """Where the limits of this process stand, its own cgroup first and then those around it; and whether it is v2."""
    try:
        own = (root / "proc/self/cgroup").read_text(encoding="utf-8", errors="replace").splitlines()
        mounts = (root / "proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    paths = {}
    for line in own:
        _, names, path = line.split(":", 2)
        paths.update(dict.fromkeys(names.split(","), path))
    for line in mounts:
        fields, _, kind = line.partition(" - ")
        _, _, _, top, place, *_ = fields.split(" ")
        name, _, options = kind.split(" ", 2)
        if name == "cgroup2":
            path = paths.get("", "/")
        elif name == "cgroup" and controller in options.split(","):
            path = paths.get(controller, "/")
        else:
            continue
        base = root / place.lstrip("/")
        # a container sees its own cgroup as the root of the mount, whatever its path is outside
        below = path.removeprefix(top).strip("/") if path.startswith(top) else ""
        folder = base / below
        yield folder, name == "cgroup2"
        while folder != base and base in folder.parents:
            folder = folder.parent
            yield folder, name == "cgroup2"


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):  # "max", or no such file at the root
        return None


def _dropped(folder: Path, name: str) -> int:
    with contextlib.suppress(OSError, ValueError):
        for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines():
            if line.startswith(f"{name} "):
                return int(line.split()[1])
    return 0
