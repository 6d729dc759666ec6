from __future__ import annotations

import subprocess
import sys

import pytest


def test_help_names_every_verb(llamamem) -> None:
    result = llamamem("--help")
    assert result.status == 0
    for verb in ("build", "vendor", "serve", "smoke", "demo", "fixture", "sidecar", "parity", "bench", "doctor"):
        assert f" {verb} " in result.out


def test_version(llamamem) -> None:
    from llamamem import __version__

    assert llamamem("--version").out == f"llamamem {__version__}\n"


@pytest.mark.parametrize("arguments", [["no-such-verb"], ["build", "--no-such-flag"], ["build", "--jobs", "0"]])
def test_a_usage_error_exits_2(llamamem, arguments: list[str]) -> None:
    assert llamamem(*arguments).status == 2


def test_the_package_itself_needs_the_standard_library_alone() -> None:
    """CMake runs it before any dependency is installed."""
    code = "import sys; sys.path.insert(0, '.'); import llamamem.native.vendor; print('ok')"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "ok\n", done.stderr
