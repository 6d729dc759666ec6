"""The patches of this project, as they are checked in."""

from __future__ import annotations

import re

import pytest

from llamamem.native.identity import series_names, source_root

PATCHES = source_root() / "patches"
NAMES = series_names(PATCHES)


@pytest.fixture(scope="module")
def hooks() -> dict[str, str]:
    """patches/README.md: file -> the patches its rows name."""
    found: dict[str, str] = {}
    for line in (PATCHES / "README.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 4:
            for name in re.findall(r"`([^`]+)`", cells[0]):
                found[name] = f"{found.get(name, '')} {cells[2]}"
    return found


@pytest.mark.parametrize("name", NAMES)
def test_every_hook_is_in_the_table(name: str, hooks: dict[str, str]) -> None:
    for file in re.findall(r"(?m)^\+\+\+ b/(\S+)", (PATCHES / name).read_text()):
        assert name[:4] in hooks.get(file, ""), f"patches/README.md has no row for {file} in {name[:4]}"


def test_the_table_has_no_hook_that_is_gone(hooks: dict[str, str]) -> None:
    text = "".join((PATCHES / name).read_text() for name in NAMES)
    gone = [file for file in hooks if "/" in file and f"+++ b/{file}\n" not in text]
    assert gone == []


@pytest.mark.parametrize("name", NAMES)
def test_every_patch_says_what_would_let_it_go(name: str) -> None:
    message = (PATCHES / name).read_text().partition("\n---\n")[0]
    assert re.search(r"(?m)^Unnecessary once ", message)


def test_no_patch_is_left_out_of_the_series() -> None:
    assert sorted(path.name for path in PATCHES.glob("*.patch")) == NAMES
