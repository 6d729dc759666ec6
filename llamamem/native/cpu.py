"""Which CPU a build needs, and whether this one is it: said by name, before an illegal instruction says it.

Standard library only: CMake runs this while it configures.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from llamamem.errors import LlamamemError

__all__ = ["CpuRecord", "check_cpu", "cpu_name", "read_record"]

_FILE = "llamamem-cpu.json"
_PROC = Path("/proc/cpuinfo")

# what a compiler uses by itself: its macro -> the kernel's word for it in /proc/cpuinfo
_FEATURES = {
    "__SSE3__": "pni",
    "__SSSE3__": "ssse3",
    "__SSE4_1__": "sse4_1",
    "__SSE4_2__": "sse4_2",
    "__POPCNT__": "popcnt",
    "__LZCNT__": "abm",
    "__MOVBE__": "movbe",
    "__BMI__": "bmi1",
    "__BMI2__": "bmi2",
    "__AVX__": "avx",
    "__AVX2__": "avx2",
    "__F16C__": "f16c",
    "__FMA__": "fma",
    "__GFNI__": "gfni",
    "__AVXVNNI__": "avx_vnni",
    "__AVX512F__": "avx512f",
    "__AVX512BW__": "avx512bw",
    "__AVX512CD__": "avx512cd",
    "__AVX512DQ__": "avx512dq",
    "__AVX512VL__": "avx512vl",
    "__AVX512IFMA__": "avx512ifma",
    "__AVX512VBMI__": "avx512vbmi",
    "__AVX512VBMI2__": "avx512_vbmi2",
    "__AVX512VNNI__": "avx512_vnni",
    "__AVX512BITALG__": "avx512_bitalg",
    "__AVX512VPOPCNTDQ__": "avx512_vpopcntdq",
    "__AVX512BF16__": "avx512_bf16",
    "__AVX512FP16__": "avx512_fp16",
    "__AMX_TILE__": "amx_tile",
    "__AMX_INT8__": "amx_int8",
    "__AMX_BF16__": "amx_bf16",
    "__ARM_FEATURE_FP16_VECTOR_ARITHMETIC": "asimdhp",
    "__ARM_FEATURE_DOTPROD": "asimddp",
    "__ARM_FEATURE_MATMUL_INT8": "i8mm",
    "__ARM_FEATURE_BF16": "bf16",
    "__ARM_FEATURE_SVE": "sve",
    "__ARM_FEATURE_SVE2": "sve2",
}


@dataclass(frozen=True)
class CpuRecord:
    """What stands beside the binaries; `amx` says what became of it, empty on a CPU without it."""

    compiler: str
    machine: str
    features: tuple[str, ...]
    amx: str


def read_record(bin_dir: Path) -> CpuRecord | None:
    """The record of a build; None for one without it, as another project's has none."""
    try:
        data = json.loads((bin_dir / _FILE).read_text(encoding="utf-8"))
        return CpuRecord(data["compiler"], data["machine"], tuple(data["features"]), data["amx"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def check_cpu(bin_dir: Path) -> None:
    """Raises LlamamemError that names the features which the binaries need and this CPU lacks.

    To be called before anything there runs: what comes otherwise is SIGILL, or nothing at all.
    """
    record, here = read_record(bin_dir), _cpuinfo("flags", "Features").split()
    if record is None or not here:  # no record, or a system that does not tell
        return
    if record.machine != platform.machine():
        raise LlamamemError(
            f"{bin_dir}: was built for {record.machine}, this is {platform.machine()}: run `llamamem build` here"
        )
    if missing := [name for name in record.features if name not in here]:
        raise LlamamemError(
            f"{bin_dir}: was built for a CPU with {', '.join(missing)}, which {cpu_name()} lacks: run `llamamem build`"
            " here, or there with -D GGML_NATIVE=OFF"
        )


def cpu_name() -> str:
    """As the kernel calls it."""
    return _cpuinfo("model name", "Model") or platform.machine() or "this CPU"


def _cpuinfo(*names: str) -> str:
    try:
        lines = _PROC.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in names:
            return value.strip()
    return ""


def _write(bin_dir: Path, compiler: str, amx: str, command: list[str]) -> None:
    """`command` is the compiler with its flags: its macros say which features it takes for granted."""
    done = subprocess.run([*command, "-dM", "-E", "-x", "c++", "/dev/null"], capture_output=True, text=True, check=True)
    macros = {line.split()[1] for line in done.stdout.splitlines() if line.startswith("#define ")}
    features = tuple(feature for macro, feature in _FEATURES.items() if macro in macros)
    record = CpuRecord(compiler, platform.machine(), features, amx)
    bin_dir.mkdir(parents=True, exist_ok=True)
    (bin_dir / _FILE).write_text(json.dumps(asdict(record), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    _write(Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[5:])
