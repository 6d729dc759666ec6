"""The patch series as files: laid over the pristine tree as commits, and written from commits.

A patch file is the commit message, a line `---`, and a git diff with as little context as applies to the same result.
Standard library only.
"""

from __future__ import annotations

import re
from pathlib import Path

from llamamem.errors import LlamamemError
from llamamem.native.git import Repository
from llamamem.native.identity import LOCK, series_names

__all__ = ["PRISTINE", "export", "file_name", "replay", "write_series"]

PRISTINE = "pristine"


def replay(repo: Repository, patches: Path, pristine_tree: str) -> list[str]:
    """Commits for the pristine tree and each patch, made in a scratch index: no file of the tree is touched."""
    commit = repo.line("rev-parse", "--verify", f"{PRISTINE}^{{commit}}")
    if (found := repo.tree(commit)) != pristine_tree:
        raise LlamamemError(
            f"{repo.path}: is upstream tree {found}, {LOCK} wants {pristine_tree}: delete {repo.path} and try again"
        )
    commits = [commit]
    with repo.scratch_index(pristine_tree) as scratch:
        for name in series_names(patches):
            message, diff = _split((patches / name).read_bytes(), patches / name)
            try:
                scratch.run("apply", "--cached", "--whitespace=nowarn", "-", data=diff)
            except LlamamemError as error:
                raise LlamamemError(f"{patches / name}: does not apply ({error})") from None
            commits.append(repo.commit_tree(scratch.line("write-tree"), message, commits[-1]))
    return commits


def _split(patch: bytes, path: Path) -> tuple[str, bytes]:
    """Message and diff of a patch file: the text before the line `---`, and what follows."""
    text, mark, diff = patch.partition(b"\n---\n")
    if not mark or not diff.lstrip().startswith(b"diff --git "):
        raise LlamamemError(f"{path}: not a patch with a message, a line `---` and a git diff")
    return text.decode() + "\n", diff.lstrip()


def _join(message: str, diff: bytes) -> bytes:
    # Blob ids change with every neighbour's edit and say nothing here: the lock file's tree hash is the check.
    diff = re.sub(rb"(?m)^index [0-9a-f]+\.\.[0-9a-f]+( [0-7]+)?\n", b"", diff)
    return message.strip().encode() + b"\n---\n" + diff


def file_name(number: int, message: str) -> str:
    subject = re.sub(r"[^A-Za-z0-9_.]+", "-", message.strip().splitlines()[0]).strip("-.")
    return f"{number:04d}-{subject[:52].rstrip('-.')}.patch"


def export(repo: Repository) -> dict[str, bytes]:
    """One patch for each commit since `pristine`, with as little context as still applies to the same result."""
    commits = repo.line("rev-list", "--reverse", "--parents", f"{PRISTINE}..HEAD").splitlines()
    patches: dict[str, bytes] = {}
    for number, line in enumerate(commits, 1):
        commit, *parents = line.split()
        if len(parents) != 1:
            raise LlamamemError(f"{repo.path}: commit {commit[:12]} is a merge: use git rebase instead")
        message = repo.run("log", "-1", "--format=%B", commit).decode()
        if "\n---\n" in message:
            raise LlamamemError(f"{repo.path}: the message of {commit[:12]} has a line `---`: reword it")
        for context in (1, 2, 3):
            flags = ["-p", "-r", "--no-renames", "--no-ext-diff", "--no-color", "--binary", f"-U{context}"]
            patch = _join(message, repo.run("diff-tree", *flags, parents[0], commit))
            if _gives(repo, patch, parents[0], commit):
                break
        else:
            raise LlamamemError(f"{repo.path}: commit {commit[:12]} does not survive being written as a patch")
        patches[file_name(number, message)] = patch
    return patches


def _gives(repo: Repository, patch: bytes, parent: str, commit: str) -> bool:
    with repo.scratch_index(repo.tree(parent)) as scratch:
        try:
            scratch.run("apply", "--cached", "--whitespace=nowarn", "-", data=_split(patch, repo.path)[1])
        except LlamamemError:
            return False
        return scratch.line("write-tree") == repo.tree(commit)


def write_series(folder: Path, patches: dict[str, bytes]) -> list[str]:
    old = series_names(folder)
    comments = [line for line in (folder / "series").read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    changed = []
    text = "\n".join([*comments, *patches, ""])
    for name, data in {**patches, "series": text.encode()}.items():
        path = folder / name
        if not path.is_file() or path.read_bytes() != data:
            path.write_bytes(data)
            changed.append(f"patches/{name}")
    for name in set(old) - set(patches):
        (folder / name).unlink()
        changed.append(f"patches/{name} (removed)")
    return changed
