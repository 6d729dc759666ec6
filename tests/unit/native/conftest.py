from __future__ import annotations

import json
from pathlib import Path

import pytest
from fake_upstream import UPSTREAM, git, write_sdist

from llamamem.native import build, identity, vendor


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with a tiny upstream in a local sdist, an empty series, and no tree yet."""
    (tmp_path / "reference").mkdir()
    for name, text in UPSTREAM.items():
        path = tmp_path / "reference" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text.encode())
    (tmp_path / "reference" / "run.sh").chmod(0o755)
    git(tmp_path / "reference", "init", "--quiet")
    git(tmp_path / "reference", "add", "--all", "--force")
    tree = git(tmp_path / "reference", "write-tree")

    sdist = tmp_path / "pkg-1.0.tar.gz"
    project = tmp_path / "project"
    (project / "vendor").mkdir(parents=True)
    (project / "patches" / "src").mkdir(parents=True)
    (project / "patches" / "series").write_text("# the series\n")
    (project / "patches" / "src" / "llama-own.cpp").write_text("int own;\n")
    (project / "CMakeLists.txt").write_text("")
    lock = {
        "requirement": "pkg==1.0",
        "sha256": write_sdist(sdist, UPSTREAM),
        "subdirectory": "vendor/up",
        "upstream_commit": "0123456789abcdef0123456789abcdef01234567",
        "pristine_tree": tree,
        "patched_tree": tree,
    }
    (project / "vendor" / "llama.cpp.lock").write_text(json.dumps(lock))
    monkeypatch.setenv("LLAMAMEM_SDIST", str(sdist))
    monkeypatch.delenv("LLAMAMEM_BIN_DIR", raising=False)
    for module in (identity, vendor, build):
        monkeypatch.setattr(module, "source_root", lambda: project)
    return project


@pytest.fixture
def tree(root: Path) -> Path:
    """The tree of `root`, materialised."""
    return vendor.materialise(root)
