"""`llamamem build` with stand-ins for CMake and ninja: what it says, keeps and refuses."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from llamamem.errors import LlamamemError
from llamamem.native import build as native
from llamamem.native import vendor
from llamamem.native.compile import failing_lines

CMAKE = """#!/bin/sh
[ "$1" = --version ] && { echo "cmake version 3.30.0"; exit 0; }
echo cmake "$@" >> "$CALLS"
while [ "$1" != -B ]; do shift; done
if [ -n "$REFUSAL" ]; then echo "$REFUSAL" > "$2/llamamem-refusal.txt"; exit 1; fi
if [ -n "$CMAKE_SAYS" ]; then echo "$CMAKE_SAYS"; exit 1; fi
touch "$2/build.ninja"
"""

NINJA = """#!/bin/sh
[ "$1" = --version ] && { echo 1.11.1; exit 0; }
echo ninja "$@" >> "$CALLS"
if [ -n "$BROKEN" ]; then
    echo "[1/3] Building CXX object a.cpp.o"
    echo "FAILED: b.cpp.o"
    echo "/usr/bin/c++ -DLONG=1 -c b.cpp"
    echo "b.cpp:7:1: error: expected unqualified-id"
    echo "    7 | oops"
    echo "ninja: build stopped: subcommand failed."
    exit 1
fi
echo "[3/3] Linking"
mkdir -p "$2/bin"
for name in llama-server llama-completion llama-bench llama-quantize llama-gguf-split; do
    printf '#!/bin/sh\\necho "llamamem: %s"\\n' "${SAYS:-$IDENTITY}" > "$2/bin/$name"
    chmod +x "$2/bin/$name"
done
"""


@pytest.fixture
def calls(root: Path, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins first on PATH; the file lists how they were called."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in (("cmake", CMAKE), ("ninja", NINJA)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    log = tmp_path / "calls"
    log.touch()
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(log))
    monkeypatch.setenv("IDENTITY", vendor.identity(root))
    return log


def called(calls: Path) -> list[str]:
    return [line.split()[0] for line in calls.read_text().splitlines()]


def test_build_then_reuse(root: Path, calls: Path, llamamem) -> None:
    first = llamamem("build")
    assert first.status == 0, first.err
    place = Path(first.out.strip())
    assert place.parent == root / "build" and place.name.startswith("cpu-")
    assert called(calls) == ["cmake", "ninja"]
    second = llamamem("build", "--json")
    assert "is up to date" in second.err
    assert json.loads(second.out)["identity"] == vendor.identity(root)
    assert called(calls) == ["cmake", "ninja"]
    assert native.find_build().bin_dir == place / "bin"


def test_a_changed_source_is_an_incremental_build_in_the_same_place(
    root: Path, calls: Path, llamamem, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = llamamem("build").out
    (root / "patches" / "src" / "llama-own.cpp").write_text("int changed;\n")
    with pytest.raises(LlamamemError, match=r"is build .*, the sources are .*: run `llamamem build`"):
        native.find_build()
    monkeypatch.setenv("IDENTITY", vendor.identity(root))
    assert llamamem("build").out == first
    assert called(calls) == ["cmake", "ninja", "ninja"]


def test_the_tools_of_the_first_build_are_kept(
    root: Path, calls: Path, tmp_path: Path, llamamem, monkeypatch: pytest.MonkeyPatch
) -> None:
    llamamem("build")
    newer = tmp_path / "newer"
    newer.mkdir()
    for name in ("cmake", "ninja"):
        (newer / name).write_text("#!/bin/sh\n[ $1 = --version ] && echo 99.0 || exit 1\n")
        (newer / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{newer}{os.pathsep}{os.environ['PATH']}")
    assert llamamem("build", "--tests").status == 0
    assert called(calls) == ["cmake", "ninja", "cmake", "ninja"]


def test_flags_and_backends_have_directories_of_their_own(calls: Path, llamamem) -> None:
    places = {llamamem("build").out, llamamem("build", "-D", "GGML_NATIVE=OFF").out}
    places.add(llamamem("build", "--backend", "cuda", "--arch", "90").out)
    assert len(places) == 3 and all(places)
    assert native.find_build("cuda").backend == "cuda"


def test_a_failure_ends_with_the_compilers_lines_and_the_log(
    root: Path, calls: Path, llamamem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BROKEN", "1")
    result = llamamem("build")
    assert result.status == 1
    *_, failed, error, source, last = result.err.splitlines()
    assert failed == "failed: b.cpp.o"
    assert error == "b.cpp:7:1: error: expected unqualified-id"
    assert source == "    7 | oops"
    log = Path(last.rpartition("full log: ")[2])
    assert "-DLONG=1" in log.read_text() and "-DLONG=1" not in result.err
    with pytest.raises(LlamamemError, match="no build of llamamem"):
        native.find_build()


def test_a_failed_rebuild_is_not_taken_for_finished(calls: Path, llamamem, monkeypatch: pytest.MonkeyPatch) -> None:
    llamamem("build")
    monkeypatch.setenv("BROKEN", "1")
    assert llamamem("build", "--tests").status == 1
    with pytest.raises(LlamamemError, match="no build of llamamem"):
        native.find_build()


def test_a_refusal_of_cmakes_is_one_line(calls: Path, llamamem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFUSAL", "CUDA: nvcc was not found")
    result = llamamem("build", "--backend", "cuda")
    assert result.status == 2
    assert result.err.splitlines()[-1].startswith("llamamem: error: CUDA: nvcc was not found (log: ")
    assert called(calls) == ["cmake"]


def test_an_error_of_cmakes_is_quoted(calls: Path, llamamem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CMAKE_SAYS", "-- fine\nCMake Error at x.cmake:3:\n  no such thing\n-- after")
    result = llamamem("build")
    assert result.status == 1
    assert "CMake failed: CMake Error at x.cmake:3: no such thing" in result.err


def test_a_build_that_reports_another_identity_is_not_accepted(
    calls: Path, llamamem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAYS", "ffffffff+stock")
    result = llamamem("build")
    assert result.status == 2
    assert "reports ffffffff+stock, expected " in result.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backend", "metal"], "--backend metal: no such backend"),
        (["--arch", "90"], "--arch 90: is for --backend cuda alone"),
    ],
)
def test_bad_arguments(calls: Path, llamamem, arguments: list[str], message: str) -> None:
    result = llamamem("build", *arguments)
    assert result.status == 2 and message in result.err
    assert called(calls) == []


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    folder = tmp_path / "elsewhere" / "bin"
    folder.mkdir(parents=True)
    return folder


def fake_server(folder: Path, says: str) -> None:
    (folder / "llama-server").write_text(f"#!/bin/sh\necho 'version: 0 (stock)'\n{says}\n")
    (folder / "llama-server").chmod(0o755)


def test_a_build_made_elsewhere_is_asked_who_it_is(
    root: Path, tree: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMAMEM_BIN_DIR", str(elsewhere))
    with pytest.raises(LlamamemError, match=r"LLAMAMEM_BIN_DIR=.*: its llama-server is missing"):
        native.find_build()
    fake_server(elsewhere, "")
    with pytest.raises(LlamamemError, match="is not llamamem's build"):
        native.find_build()
    fake_server(elsewhere, "echo 'llamamem: 0c1e57098+000000000000'")
    with pytest.raises(LlamamemError) as both:
        native.find_build()
    assert "0c1e57098+000000000000" in str(both.value) and vendor.identity(root) in str(both.value)
    fake_server(elsewhere, f"echo 'llamamem: {vendor.identity(root)}'")
    assert native.find_build().bin_dir == elsewhere
    monkeypatch.setenv("LLAMAMEM_BIN_DIR", "/nonexistent")
    assert native.find_build(bin_dir=elsewhere).identity == vendor.identity(root)
    with pytest.raises(LlamamemError, match="bin-exact"):
        native.find_build(bin_dir=elsewhere, exact_gelu=True)


def test_failing_lines_keeps_the_first_failures_and_says_how_many_are_left() -> None:
    text = "FAILED: [code=1] a.o\nc++ a.cpp\n" + "".join(f"a.cpp:{n}: error\n" for n in range(30))
    shown = failing_lines(text)
    assert shown[:2] == ["failed: a.o", "a.cpp:0: error"]
    assert shown[-1] == "... 11 more lines in the log"


def test_without_a_failed_target_the_last_lines_are_shown() -> None:
    assert failing_lines("one\n\nninja: error: loading 'build.ninja'\n") == [
        "one",
        "ninja: error: loading 'build.ninja'",
    ]
