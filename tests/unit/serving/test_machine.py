"""What of the machine is ours: cgroups of both versions, by stand-in files and, where root may, for real."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from llamamem.serving import machine
from llamamem.serving.machine import available_memory, processors

GIB = 1 << 30


@pytest.fixture(autouse=True)
def big_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 64)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 100 * GIB}))


def cgroups(root: Path, own: str, mounts: str, values: dict[str, str]) -> Path:
    for name, text in {"proc/self/cgroup": own, "proc/self/mountinfo": mounts, **values}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


V2 = "30 24 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1 = "\n".join(
    f"3{n} 31 0:3{n} {top} /sys/fs/cgroup/{name} ro,relatime - cgroup cgroup rw,{name}"
    for n, (name, top) in enumerate({"cpu,cpuacct": "/docker/abc", "memory": "/docker/abc", "pids": "/"}.items())
)


def test_version_2_the_tightest_on_the_way_up_counts(tmp_path: Path) -> None:
    """As systemd or Kubernetes nests them: the quota stands on the pod, the memory on the container."""
    root = cgroups(
        tmp_path,
        "0::/pod/box",
        V2,
        {
            "sys/fs/cgroup/pod/box/cpu.max": "max 100000",
            "sys/fs/cgroup/pod/cpu.max": "250000 100000",
            "sys/fs/cgroup/pod/box/memory.max": str(8 * GIB),
            "sys/fs/cgroup/pod/box/memory.current": str(6 * GIB),
            "sys/fs/cgroup/pod/box/memory.stat": f"anon 1\ninactive_file {5 * GIB}\nactive_file 3",
            "sys/fs/cgroup/pod/memory.max": "max",
            "sys/fs/cgroup/pod/memory.current": str(6 * GIB),
        },
    )
    assert processors(root) == machine.Processors(2, 64, "the cgroup's quota of 2.5 processors")
    assert available_memory(root) == (7 * GIB, "are left of the cgroup's limit")


def test_version_1_in_a_container_that_sees_its_own_cgroup_as_the_root(tmp_path: Path) -> None:
    root = cgroups(
        tmp_path,
        "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n2:pids:/",
        V1,
        {
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "50000",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": str(2 * GIB),
            "sys/fs/cgroup/memory/memory.usage_in_bytes": str(3 * GIB),
            "sys/fs/cgroup/memory/memory.stat": "cache 7\ntotal_inactive_file 0",
        },
    )
    assert processors(root).usable == 1  # half a processor is one thread
    assert available_memory(root)[0] == 0


@pytest.mark.parametrize("quota", ["-1", "max 100000", "nonsense", ""])
def test_no_quota_is_the_whole_machine(tmp_path: Path, quota: str) -> None:
    values = {
        "sys/fs/cgroup/cpu.max": quota,
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": quota,
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
        "sys/fs/cgroup/memory.max": "max",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "1",
    }
    root = cgroups(tmp_path, "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n0::/", f"{V1}\n{V2}", values)
    assert processors(root) == machine.Processors(64, 64, None)
    assert available_memory(root) == (100 * GIB, "are free")


def test_a_system_without_cgroups(tmp_path: Path) -> None:
    assert processors(tmp_path).limit is None and available_memory(tmp_path) == (100 * GIB, "are free")


def test_the_affinity_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: {3, 5}, raising=False)
    assert processors(tmp_path) == machine.Processors(2, 64, "the affinity mask")


# where root may make a cgroup, by version and controller: the file of its limit, and what is written there
REAL = {
    "cpu": (
        ("/sys/fs/cgroup", "cpu.max", "150000 100000"),
        ("/sys/fs/cgroup/unified", "cpu.max", "150000 100000"),
        ("/sys/fs/cgroup/cpu", "cpu.cfs_quota_us", "150000"),
    ),
    "memory": (
        ("/sys/fs/cgroup", "memory.max", str(GIB // 2)),
        ("/sys/fs/cgroup/unified", "memory.max", str(GIB // 2)),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", str(GIB // 2)),
    ),
}


def run_in(cgroup: Path, *command: str) -> subprocess.CompletedProcess[str]:
    enter = f'echo $$ > {cgroup}/cgroup.procs && exec "$@"'
    return subprocess.run(["sh", "-c", enter, "sh", *command], capture_output=True, text=True, timeout=120)


@pytest.fixture
def limited(request: pytest.FixtureRequest) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """Runs a command in a cgroup of this kernel that has the limit of `request.param`; version 2 before version 1."""
    for parent, name, text in REAL[request.param]:
        own = Path(parent, f"llamamem-test-{os.getpid()}")
        try:
            own.mkdir()
        except OSError:
            continue
        try:
            if not (own / name).exists():
                continue
            (own / name).write_text(text)
            yield partial(run_in, own)
            return
        finally:
            own.rmdir()
    pytest.skip(f"no cgroup with a {request.param} controller can be made here")


@pytest.mark.parametrize("limited", ["cpu"], indirect=True)
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one processor is less than the quota")
def test_a_quota_of_this_kernel(limited: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    code = "from llamamem.serving.machine import processors; print(processors().limit)"
    done = limited(sys.executable, "-c", code)
    assert (done.returncode, done.stdout) == (0, "the cgroup's quota of 1.5 processors\n"), done.stderr


@pytest.mark.parametrize("limited", ["memory"], indirect=True)
def test_a_memory_limit_of_this_kernel(
    limited: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    """Files that were read and can be dropped again leave room; what the process holds itself does not."""
    code = """
import pathlib, sys
from llamamem.serving.machine import available_memory
path = pathlib.Path(sys.argv[1])
path.write_bytes(bytes(50 << 20))
before = available_memory()
kept = path.read_bytes(), bytearray(b"x") * (100 << 20)
after = available_memory()
print(before[0], after[0], after[1])
"""
    done = limited(sys.executable, "-c", code, str(tmp_path / "file"))
    assert done.returncode == 0, done.stderr
    before, after, *words = done.stdout.split(maxsplit=2)
    assert words == ["are left of the cgroup's limit\n"]
    assert GIB // 2 > int(before) > int(after) > 0 and 140 << 20 < int(before) - int(after) < 200 << 20
