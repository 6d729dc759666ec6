"""Fuzzes both readers of sidecars: the runtime's under libFuzzer with two sanitizers, then the Python one.

    python tools/fuzz.py --seconds 60                 the loader for a minute, then the reader
    python tools/fuzz.py --runs 1000000 --jobs 2      the loader a million times, in two processes
    python tools/fuzz.py --coverage                   which lines of the loader the inputs so far have reached

All is kept in build/fuzz: `corpus` grows from run to run, `findings` has the inputs that broke something. The exit
status is 1 if any did.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from llamamem.errors import LlamamemError
from llamamem.native import tools
from llamamem.native.compile import run_cmake, run_ninja

ROOT = Path(__file__).parents[1]
PLACE = ROOT / "build" / "fuzz"
CORPUS, FINDINGS = PLACE / "corpus", PLACE / "findings"
TARGET = "fuzz-adapter-mem-sidecar"
READER_TEST = "tests/unit/formats/sidecar/test_reader_fuzz.py"

_PROBE = """#include <stddef.h>
#include <stdint.h>
extern "C" int LLVMFuzzerTestOneInput(const uint8_t *, size_t) { return 0; }
"""
_SHOWN = 12  # lines of what a sanitizer said


def main() -> int:
    """Runs what was asked for; returns the exit status."""
    parser = argparse.ArgumentParser(description="Fuzzes both readers of sidecars.")
    parser.add_argument("--seconds", type=int, help="time for each of the two readers (default: 60, without --runs)")
    parser.add_argument("--runs", type=int, help="executions of the loader, of all processes together")
    parser.add_argument("--jobs", type=int, default=1, help="processes that fuzz the loader")
    parser.add_argument("--coverage", action="store_true", help="report the lines that the corpus reaches; no fuzzing")
    args = parser.parse_args()
    if args.jobs < 1 or any(n is not None and n < 1 for n in (args.seconds, args.runs)):
        raise LlamamemError("--seconds, --runs and --jobs must be 1 or more")
    for folder in (CORPUS, FINDINGS):
        folder.mkdir(parents=True, exist_ok=True)
    if args.coverage:
        return _coverage()
    seconds = args.seconds or (None if args.runs else 60)
    sound = _fuzz_loader(seconds, args.runs, args.jobs)
    return 0 if _fuzz_reader(seconds or 60) and sound else 1


def _fuzz_loader(seconds: int | None, runs: int | None, jobs: int) -> bool:
    """Prints the summary and the findings; true if there are none."""
    program = _build("asan")
    options = [
        f"-dict={ROOT / 'tests' / 'fuzz' / (TARGET + '.dict')}",
        f"-artifact_prefix={FINDINGS}/",
        *("-timeout=10", "-rss_limit_mb=2048", "-print_final_stats=1", "-reload=1"),
        *([f"-max_total_time={seconds}"] if seconds else []),
        *([f"-runs={-(-runs // jobs)}"] if runs else []),
    ]
    with tempfile.TemporaryDirectory() as seeds:
        _gather(Path(seeds))
        # the folder of the findings too: what was not mended is found again at once
        command = [str(program), *options, str(CORPUS), str(FINDINGS), seeds]
        print(f"fuzz: the loader, {jobs} process(es), log: {PLACE / 'loader-*.log'}", file=sys.stderr, flush=True)
        started = time.time()
        statuses = _run_all(command, [PLACE / f"loader-{i}.log" for i in range(jobs)])
        took = time.time() - started
    texts = [(PLACE / f"loader-{i}.log").read_text(encoding="utf-8", errors="replace") for i in range(jobs)]
    for text, status in zip(texts, statuses, strict=True):
        if status:
            _show_failure(text)
    n_runs = sum(_last(r"^(?:#|stat::number_of_executed_units: +)(\d+)", text) for text in texts)
    edges = max(_last(r"cov: (\d+)", text) for text in texts)
    # one that was there already is written anew when it is found again
    found = sorted(path for path in FINDINGS.iterdir() if path.stat().st_mtime >= started)
    speed = f"{n_runs} executions in {took:.0f} s, {n_runs / took:.0f}/s"
    print(f"loader: {speed}; {edges} edges covered; {len(found)} findings", flush=True)
    for path in found:
        print(f"finding: {program.relative_to(ROOT)} {path.relative_to(ROOT)}", flush=True)
    return not any(statuses)


def _fuzz_reader(seconds: int) -> bool:
    """The Hypothesis test of the Python reader; pytest reports by itself."""
    env = os.environ | {"LLAMAMEM_FUZZ_SECONDS": str(seconds)}
    print("fuzz: the Python reader", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pytest", "-q", READER_TEST]
    return subprocess.run(command, cwd=ROOT, env=env, check=False).returncode == 0


def _coverage() -> int:
    """Prints llvm-cov's table of the loader's files for corpus and seeds."""
    program, sources = _build("coverage"), sorted((ROOT / "patches" / "src").glob("llama-adapter-mem-*.cpp"))
    loader = [
        path
        for path in sources
        if re.search(r"-(gguf|config|sidecar|sidecar-kv|sidecar-keys|sidecar-tensors)\.cpp$", path.name)
    ]
    raw, data = PLACE / "coverage" / "all.profraw", PLACE / "coverage" / "all.profdata"
    with tempfile.TemporaryDirectory() as seeds:
        _gather(Path(seeds))
        env = os.environ | {"LLVM_PROFILE_FILE": str(raw)}
        command = [str(program), "-runs=0", str(CORPUS), seeds]
        if (status := _run_all(command, [PLACE / "coverage.log"], env)[0]) != 0:
            raise LlamamemError(f"{program.name}: exit status {status}, log: {PLACE / 'coverage.log'}", exit_status=1)
    for tool, *arguments in (
        ("llvm-profdata", "merge", "-sparse", str(raw), "-o", str(data)),
        ("llvm-cov", "report", str(program), f"-instr-profile={data}", *map(str, loader)),
    ):
        subprocess.run([_llvm_tool(tool), *arguments], check=True)
    return 0


def _build(kind: str) -> Path:
    """Configures and builds build/fuzz/KIND; returns the program."""
    place, compiler = PLACE / kind, _clang()
    place.mkdir(parents=True, exist_ok=True)
    ninja = tools.ninja()
    if not (place / "build.ninja").is_file():
        settings = {
            "LLAMAMEM_FUZZ": "ON",
            "LLAMAMEM_FUZZ_COVERAGE": "ON" if kind == "coverage" else "OFF",
            "CMAKE_BUILD_TYPE": "None",  # the flags are those of cmake/fuzz.cmake
            "CMAKE_C_COMPILER": compiler.replace("clang++", "clang"),
            "CMAKE_CXX_COMPILER": compiler,
            "CMAKE_MAKE_PROGRAM": ninja,
            "Python_EXECUTABLE": sys.executable,
        }
        command = [tools.cmake(), "-G", "Ninja", "-S", str(ROOT), "-B", str(place)]
        run_cmake([*command, *(f"-D{name}={value}" for name, value in settings.items())], place / "configure.log")
    run_ninja([ninja, "-C", str(place), "llamamem-fuzz"], place / "build.log")
    return place / TARGET


def _clang() -> str:
    """A clang++ that has libFuzzer; not every one comes with it."""
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder) / "probe.cpp"
        probe.write_text(_PROBE)
        for name in ("clang++", *(f"clang++-{n}" for n in range(21, 13, -1))):
            command = [name, "-fsanitize=fuzzer,address", str(probe), "-o", str(probe.with_suffix(""))]
            if shutil.which(name) and subprocess.run(command, capture_output=True, check=False).returncode == 0:
                return str(shutil.which(name))
    raise LlamamemError(
        "no clang++ with libFuzzer was found: install one, as by `apt-get install clang libclang-rt-dev`"
    )


def _llvm_tool(name: str) -> str:
    """Beside the compiler, or on PATH under its name or that of a version."""
    beside = Path(_clang()).resolve().parent / name
    versions = [f"{name}-{n}" for n in range(21, 13, -1)]
    found = next(filter(None, map(shutil.which, [str(beside), name, *versions])), None)
    if found is None:
        raise LlamamemError(f"{name} was not found: install it, as by `apt-get install llvm`")
    return found


def _gather(folder: Path) -> None:
    """The checked-in files to begin from."""
    data = ROOT / "tests" / "data"
    for path in (*data.glob("hostile/*.gguf"), *data.glob("model_a/sidecar-v*.gguf")):
        shutil.copyfile(path, folder / path.name)


def _run_all(command: list[str], logs: Iterable[Path], env: dict[str, str] | None = None) -> list[int]:
    """The same command once for each log, all at a time; their exit statuses."""
    processes = []
    try:
        for log in logs:
            with log.open("wb") as file:
                processes.append(subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=PLACE, env=env))
        return [process.wait() for process in processes]
    finally:
        for process in processes:
            process.kill()


def _show_failure(text: str) -> None:
    lines = text.splitlines()
    first = next(
        (n for n, line in enumerate(lines) if re.search(r"ERROR:|runtime error:|^FAIL ", line)), len(lines) - _SHOWN
    )
    print("\n".join(lines[max(first, 0) : first + _SHOWN]), file=sys.stderr)


def _last(pattern: str, text: str) -> int:
    """The last number that a pattern finds in a log, else 0."""
    found = re.findall(pattern, text, re.MULTILINE)
    return int(found[-1]) if found else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except LlamamemError as e:
        print(f"fuzz: error: {e}", file=sys.stderr)
        sys.exit(e.exit_status)
    except KeyboardInterrupt:
        sys.exit(130)
