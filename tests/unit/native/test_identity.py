from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from llamamem.errors import LlamamemError
from llamamem.native import vendor
from llamamem.native.identity import build_identity, patch_set_sha256


def test_the_hash_is_over_series_patches_and_sources(root: Path) -> None:
    patches = root / "patches"
    (patches / "series").write_text("0001-a.patch\n")
    (patches / "0001-a.patch").write_bytes(b"patch")
    (patches / "src" / "b.h").write_bytes(b"")
    (patches / "src" / ".b.h.swp").write_bytes(b"an editor's")
    expected = (
        b"series\x0013\x000001-a.patch\n0001-a.patch\x005\x00patchsrc/b.h\x000\x00src/llama-own.cpp\x009\x00int own;\n"
    )
    assert patch_set_sha256(root) == hashlib.sha256(expected).hexdigest()
    assert build_identity(root) == f"012345678+{hashlib.sha256(expected).hexdigest()[:12]}"


@pytest.mark.parametrize("change", ["series", "src/llama-own.cpp", "src/renamed"])
def test_every_change_shows(root: Path, change: str) -> None:
    before = build_identity(root)
    if change == "src/renamed":
        (root / "patches" / "src" / "llama-own.cpp").rename(root / "patches" / "src" / "llama-other.cpp")
    else:
        with (root / "patches" / change).open("a") as file:
            file.write("# more\n")
    assert build_identity(root) != before


def test_an_edited_tree_is_marked(root: Path, tree: Path) -> None:
    assert vendor.identity(root) == build_identity(root)
    (tree / "README.md").write_text("edited\n")
    assert vendor.identity(root) == build_identity(root) + "-edited"


def test_the_header_is_rewritten_only_when_it_changes(root: Path, tree: Path, tmp_path: Path) -> None:
    header = tmp_path / "id.h"
    assert vendor.main(["identity", "--header", str(header)]) == 0
    assert header.read_text() == f'#define LLAMAMEM_BUILD_ID "{build_identity(root)}"\n'
    before = header.stat().st_mtime_ns
    vendor.main(["identity", "--header", str(header)])
    assert header.stat().st_mtime_ns == before


def test_a_series_that_names_a_missing_patch_is_refused(root: Path) -> None:
    (root / "patches" / "series").write_text("0001-gone.patch\n")
    with pytest.raises(LlamamemError, match=r"names 0001-gone\.patch"):
        build_identity(root)


def test_a_broken_lock_file_is_refused(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "vendor" / "llama.cpp.lock").write_text("{}")
    assert vendor.main(["identity"]) == 2
    assert "llama.cpp.lock: has no field 'requirement'" in capsys.readouterr().err
