from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from fake_upstream import UPSTREAM, edit, git, write_sdist

from llamamem.errors import LlamamemError
from llamamem.native import vendor


def files(tree: Path) -> dict[str, bytes]:
    found = (path for path in tree.rglob("*") if path.is_file() and ".git" not in path.relative_to(tree).parts)
    return {path.relative_to(tree).as_posix(): path.read_bytes() for path in found}


def add_patch(tree: Path, name: str, old: str, new: str, message: str) -> None:
    edit(tree, name, old, new)
    git(tree, "commit", "--quiet", "--all", "--message", message)


def two_patches(root: Path, tree: Path) -> None:
    add_patch(tree, "src/core.cpp", "line_3;", "line_3; // hook", "core: call the hook\n\nWhy, and until when.")
    add_patch(tree, "src/core.cpp", "line_9;", "line_9; // state", "core: keep the state")
    vendor.refresh(root)


def test_the_tree_is_upstream_byte_for_byte(tree: Path) -> None:
    assert files(tree) == {name: text.encode() for name, text in UPSTREAM.items()}
    assert os.access(tree / "run.sh", os.X_OK)
    assert not os.access(tree / "README.md", os.X_OK)


def test_the_submodule_link_is_replaced_by_a_repository(tree: Path) -> None:
    assert (tree / ".git").is_dir()
    assert git(tree, "status", "--porcelain", "--ignored") == ""


def test_commits_are_the_same_everywhere(root: Path, tree: Path) -> None:
    two_patches(root, tree)
    heads = []
    for _ in range(2):
        shutil.rmtree(tree)
        vendor.apply(root)
        heads.append(git(tree, "rev-parse", "HEAD"))
    assert heads[0] == heads[1]
    assert git(tree, "log", "--format=%s").splitlines()[:2] == ["core: keep the state", "core: call the hook"]


def test_a_second_apply_changes_nothing(root: Path, tree: Path) -> None:
    index = tree / ".git" / "index"
    before = index.stat().st_mtime_ns
    assert vendor.apply(root) is False
    assert index.stat().st_mtime_ns == before  # upstream's CMake configures again when it changes


def test_applying_touches_only_the_files_that_a_patch_changes(root: Path, tree: Path) -> None:
    two_patches(root, tree)
    shutil.rmtree(tree)
    patches, lock = root / "patches", root / "vendor" / "llama.cpp.lock"
    patched = (patches / "series").read_text(), lock.read_text()
    (patches / "series").write_text("")
    pin = json.loads(lock.read_text())
    lock.write_text(json.dumps({**pin, "patched_tree": pin["pristine_tree"]}))
    vendor.apply(root)
    for path in tree.rglob("*.*"):
        if ".git" not in path.parts:
            os.utime(path, (1_000_000_000, 1_000_000_000))
    (patches / "series").write_text(patched[0])
    lock.write_text(patched[1])
    assert vendor.apply(root) is True
    touched = {name for name in files(tree) if (tree / name).stat().st_mtime != 1_000_000_000}
    assert touched == {"src/core.cpp"}
    assert "hook" in (tree / "src" / "core.cpp").read_text()


def test_refresh_round_trip(root: Path, tree: Path) -> None:
    two_patches(root, tree)
    assert (root / "patches" / "series").read_text().splitlines() == [
        "# the series",
        "0001-core-call-the-hook.patch",
        "0002-core-keep-the-state.patch",
    ]
    patch = (root / "patches" / "0001-core-call-the-hook.patch").read_text()
    assert patch.startswith(
        "core: call the hook\n\nWhy, and until when.\n---\ndiff --git a/src/core.cpp b/src/core.cpp\n"
    )
    assert "\nindex " not in patch
    assert [line for line in patch.splitlines() if line.startswith(" ")] == [" int line_2;", " int line_4;"]
    assert vendor.verify(root) == []
    assert vendor.refresh(root) == []
    before = files(tree)
    shutil.rmtree(tree)
    vendor.apply(root)
    assert files(tree) == before


def test_refresh_renames_and_removes(root: Path, tree: Path) -> None:
    two_patches(root, tree)
    git(tree, "reset", "--quiet", "--hard", "HEAD~1")
    git(tree, "commit", "--quiet", "--amend", "--message", "core: another name")
    vendor.refresh(root)
    assert sorted(path.name for path in (root / "patches").glob("*.patch")) == ["0001-core-another-name.patch"]


def test_refresh_takes_more_context_where_one_line_is_ambiguous(root: Path, tree: Path) -> None:
    (tree / "src" / "other.cpp").write_text("a\nx\nb\n" * 30)
    git(tree, "commit", "--quiet", "--all", "--message", "other: repeat")
    lines = ("a\nx\nb\n" * 30).splitlines()
    lines.insert(61, "hook")
    (tree / "src" / "other.cpp").write_text("\n".join(lines) + "\n")
    git(tree, "commit", "--quiet", "--all", "--message", "other: hook")
    vendor.refresh(root)
    assert vendor.verify(root) == []


def test_uncommitted_edits_are_refused_or_folded(root: Path, tree: Path) -> None:
    two_patches(root, tree)
    edit(tree, "src/core.cpp", "// hook", "// better hook")
    (tree / "src" / "new.cpp").write_text("int fresh;\n")
    with pytest.raises(LlamamemError, match=r"not committed: src/core.cpp, src/new.cpp") as refused:
        vendor.refresh(root)
    assert refused.value.exit_status == 2
    before = (tree / "src" / "other.cpp").stat().st_mtime_ns
    vendor.refresh(root, into="0001")
    first = (root / "patches" / "0001-core-call-the-hook.patch").read_text()
    assert "better hook" in first and "int fresh;" in first
    assert "better" not in (root / "patches" / "0002-core-keep-the-state.patch").read_text()
    assert (tree / "src" / "other.cpp").stat().st_mtime_ns == before
    assert vendor.verify(root) == []
    assert git(tree, "status", "--porcelain") == ""


def test_folding_into_no_patch_or_a_clashing_one_loses_nothing(root: Path, tree: Path) -> None:
    two_patches(root, tree)
    edit(tree, "src/core.cpp", "line_9; // state", "line_9; // other state")
    for into, reason in (("0007", "no such patch"), ("0001", "do not fold")):
        with pytest.raises(LlamamemError, match=reason):
            vendor.refresh(root, into=into)
    assert "other state" in (tree / "src" / "core.cpp").read_text()
    assert git(tree, "worktree", "list").count("\n") == 0


@pytest.mark.parametrize("commit", [False, True])
def test_apply_never_loses_edits(root: Path, tree: Path, commit: bool) -> None:
    two_patches(root, tree)
    edit(tree, "src/core.cpp", "line_5;", "line_5; // mine")
    if commit:
        git(tree, "commit", "--quiet", "--all", "--message", "mine")
    with pytest.raises(LlamamemError, match=r"edits that no patch holds \(src/core.cpp\)") as refused:
        vendor.apply(root)
    assert refused.value.exit_status == 2
    vendor.materialise(root)
    assert "mine" in (tree / "src" / "core.cpp").read_text()
    assert vendor.identity(root).endswith("-edited")


def tamper_same_size(tree: Path) -> str:
    path = tree / "src" / "other.cpp"
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_text("int 0ther;\n")
    os.utime(path, ns=times)
    return "src/other.cpp"


def tamper_ignored(tree: Path) -> str:
    (tree / "extra.log").write_text("hidden by .gitignore")
    return "extra.log"


def tamper_mode(tree: Path) -> str:
    (tree / "README.md").chmod(0o755)
    return "README.md"


def tamper_removed(tree: Path) -> str:
    (tree / "kept.log").unlink()
    return "kept.log"


def tamper_committed(tree: Path) -> str:
    edit(tree, "README.md", "upstream", "upstart")
    git(tree, "commit", "--quiet", "--all", "--message", "unseen")
    return "README.md"


@pytest.mark.parametrize("tamper", [tamper_same_size, tamper_ignored, tamper_mode, tamper_removed, tamper_committed])
def test_a_tampered_tree_fails_verification_by_name(root: Path, tree: Path, llamamem, tamper) -> None:
    two_patches(root, tree)
    assert llamamem("vendor", "verify").status == 0
    name = tamper(tree)
    result = llamamem("vendor", "verify")
    assert result.status == 1
    assert f"{name}: differs from the recorded tree" in result.out


def test_a_tampered_patch_fails_verification(root: Path, tree: Path, llamamem) -> None:
    two_patches(root, tree)
    edit(root / "patches", "0002-core-keep-the-state.patch", "// state", "// stale")
    result = llamamem("vendor", "verify")
    assert result.status == 1
    assert "patches/series gives git tree" in result.out
    with pytest.raises(LlamamemError, match="wants"):
        vendor.apply(root)


def test_a_patch_that_does_not_apply_is_named(root: Path, tree: Path) -> None:
    two_patches(root, tree)
    edit(root / "patches", "0001-core-call-the-hook.patch", " int line_2;", " int line_x;")
    with pytest.raises(LlamamemError, match=r"0001-core-call-the-hook\.patch: does not apply"):
        vendor.apply(root)
    assert "hook" in (tree / "src" / "core.cpp").read_text()


def test_another_upstream_tree_is_refused(root: Path) -> None:
    lock = root / "vendor" / "llama.cpp.lock"
    lock.write_text(lock.read_text().replace('"pristine_tree": "', '"pristine_tree": "0000'))
    with pytest.raises(LlamamemError, match="has git tree"):
        vendor.materialise(root)
    assert not (root / "vendor" / "llama.cpp").exists()


def test_another_sdist_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    other = tmp_path / "other.tar.gz"
    write_sdist(other, {"README.md": "another upstream\n"})
    monkeypatch.setenv("LLAMAMEM_SDIST", str(other))
    with pytest.raises(LlamamemError, match="SHA-256 is"):
        vendor.fetch(root)


@pytest.mark.parametrize(
    ("files", "links"),
    [({"../../../../escaped": "x"}, {}), ({"ok": "x"}, {"link": "/etc/passwd"})],
    ids=["dot-dot", "symlink"],
)
def test_a_hostile_sdist_writes_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: dict[str, str], links: dict[str, str]
) -> None:
    hostile, lock = tmp_path / "hostile.tar.gz", root / "vendor" / "llama.cpp.lock"
    pin = json.loads(lock.read_text())
    lock.write_text(json.dumps({**pin, "sha256": write_sdist(hostile, files, links)}))
    monkeypatch.setenv("LLAMAMEM_SDIST", str(hostile))
    with pytest.raises(LlamamemError, match="not a plain file"):
        vendor.fetch(root)
    assert not list(tmp_path.rglob("escaped"))
    assert not (root / "vendor" / "llama.cpp").exists()


def test_a_folder_that_is_not_ours_is_left_alone(root: Path) -> None:
    (root / "vendor" / "llama.cpp").mkdir()
    (root / "vendor" / "llama.cpp" / "mine.txt").write_text("mine")
    with pytest.raises(LlamamemError, match="move it away"):
        vendor.materialise(root)
    assert (root / "vendor" / "llama.cpp" / "mine.txt").read_text() == "mine"


def test_the_users_git_settings_do_not_reach_the_tree(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tmp_path / "gitconfig"
    settings.write_text("[core]\n\tautocrlf = true\n[commit]\n\tgpgSign = true\n[user]\n\tname = Somebody\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(settings))
    monkeypatch.setenv("GIT_DIR", str(root / "nowhere"))
    tree = vendor.materialise(root)
    monkeypatch.delenv("GIT_DIR")
    assert (tree / "crlf.txt").read_bytes() == b"one\r\ntwo\r\n"
    assert git(tree, "log", "-1", "--format=%an %ad", "--date=short") == "llamamem 2000-01-01"
