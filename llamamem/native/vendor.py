"""Pin, fetch, patch and verify `vendor/llama.cpp`, and write its commits back as patches.

The tree is a git repository of its own: one commit for the pristine upstream, tagged `pristine`, and one for each
patch of `patches/series` on the branch `llamamem`. A note in its `.git` says which inputs it was made from, so that
the usual call finds that there is nothing to do. Local edits are never lost: every call that would overwrite one
refuses instead.

Standard library only: `python -m llamamem.native.vendor materialise` runs while CMake configures.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from llamamem.errors import LlamamemError
from llamamem.native.git import Repository
from llamamem.native.identity import EDITED, LOCK, Pin, build_identity, read_pin, series_names, source_root
from llamamem.native.sdist import cache_dir, fetch_sdist, unpack
from llamamem.native.series import PRISTINE, export, file_name, replay, write_series

__all__ = ["apply", "edits", "fetch", "identity", "is_stale", "materialise", "refresh", "tree_path", "verify"]

BRANCH = "llamamem"
Say = Callable[[str], None]


def _stderr(text: str) -> None:
    print(f"llamamem: {text}", file=sys.stderr)


def tree_path(root: Path | None = None) -> Path:
    """Where the patched tree lies: in the checkout, or for an installed wheel in the user's cache."""
    root = root or source_root()
    if root.name == "_source":
        return cache_dir() / "vendor" / read_pin(root).sha256[:12] / "llama.cpp"
    return root / "vendor" / "llama.cpp"


@contextmanager
def _locked(tree: Path) -> Iterator[None]:
    """One process at a time: two builds may start at once, and both want the tree."""
    tree.parent.mkdir(parents=True, exist_ok=True)
    with (tree.parent / f".{tree.name}.guard").open("w") as guard:
        try:
            import fcntl
        except ImportError:  # Windows: a single builder is assumed there
            yield
            return
        fcntl.flock(guard, fcntl.LOCK_EX)
        yield


# -- the note: what the tree was made from ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Note:
    inputs: str  # SHA-256 over pin and patches, or "pristine"
    tree: str  # git tree hash that they gave

    @staticmethod
    def read(repo: Repository) -> _Note | None:
        try:
            data = json.loads((repo.path / ".git" / "llamamem.json").read_text(encoding="utf-8"))
            return _Note(data["inputs"], data["tree"])
        except (OSError, ValueError, KeyError):
            return None

    def write(self, repo: Repository) -> None:
        (repo.path / ".git" / "llamamem.json").write_text(json.dumps(asdict(self)), encoding="utf-8")


def _inputs(root: Path, pin: Pin) -> str:
    """Hash of what decides the tree. The recorded hashes count too: a changed one means another tree is wanted."""
    digest = hashlib.sha256(json.dumps(asdict(pin), sort_keys=True).encode())
    for name in series_names(root / "patches"):
        data = (root / "patches" / name).read_bytes()
        digest.update(name.encode() + b"\0" + str(len(data)).encode() + b"\0" + data)
    return digest.hexdigest()


def edits(root: Path | None = None) -> list[str]:
    """Files of the tree that differ from what the patches gave; commits that no patch holds count."""
    tree = tree_path(root)
    if not (tree / ".git").is_dir():
        return []
    repo = Repository(tree)
    note = _Note.read(repo)
    base = note.tree if note else repo.tree(PRISTINE)
    return sorted(_differing(repo, base) | set(repo.edits()))


def _differing(repo: Repository, tree: str) -> set[str]:
    """Files whose content in HEAD is not that of `tree`."""
    names = repo.run("diff-tree", "-r", "-z", "--no-renames", "--name-only", tree, "HEAD").decode().split("\0")
    return {name for name in names if name}


# -- fetch and apply ----------------------------------------------------------------------------------------------


def fetch(root: Path | None = None, say: Say = _stderr) -> Path:
    """Unpack the pristine tree from the pinned sdist unless there is a tree already. Returns its path."""
    root = root or source_root()
    tree = tree_path(root)
    with _locked(tree):
        if not _is_tree(tree):
            _unpack_pristine(read_pin(root), tree, say)
    return tree


def _is_tree(tree: Path) -> bool:
    if (tree / ".git").is_dir():
        return True
    if tree.is_dir() and any(tree.iterdir()):
        raise LlamamemError(f"{tree}: is there, but not as a git repository of llamamem's: move it away and try again")
    return False


def _unpack_pristine(pin: Pin, tree: Path, say: Say) -> None:
    sdist = fetch_sdist(pin)
    say(f"unpacking llama.cpp {pin.upstream_commit[:9]}")
    # Made beside its place and renamed: an interrupted unpacking leaves no half tree behind.
    scratch = Path(tempfile.mkdtemp(prefix=f".{tree.name}.", dir=tree.parent))
    try:
        made = scratch / tree.name
        unpack(sdist, pin.subdirectory, made)
        repo = Repository(made)
        repo.init(BRANCH)
        repo.run("add", "--all", "--force")
        found = repo.line("write-tree")
        if found != pin.pristine_tree:
            raise LlamamemError(f"{sdist}: {pin.subdirectory} has git tree {found}, {LOCK} wants {pin.pristine_tree}")
        commit = repo.commit_tree(found, f"llama.cpp {pin.upstream_commit}\n\nFrom the sdist of {pin.requirement}.\n")
        repo.run("update-ref", f"refs/heads/{BRANCH}", commit)
        repo.run("tag", PRISTINE, commit)
        _Note("pristine", found).write(repo)
        if tree.is_dir():
            tree.rmdir()
        os.rename(made, tree)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def apply(root: Path | None = None, say: Say = _stderr) -> bool:
    """Bring the tree to pin + series, fetching it first when missing; False when it was there already.

    Raises `LlamamemError` when a patch does not apply, when the result is not the recorded tree, and, with the tree
    left as it is, when it has edits that no patch holds.
    """
    root = root or source_root()
    tree = fetch(root, say)
    with _locked(tree):
        pin, repo = read_pin(root), Repository(tree)
        note, inputs = _Note.read(repo), _inputs(root, pin)
        if note and note.inputs == inputs and repo.tree() == note.tree and not repo.edits():
            return False
        if edited := edits(root):
            raise LlamamemError(
                f"{tree}: has edits that no patch holds ({_few(edited)}): keep them with `llamamem vendor refresh`, "
                f"or drop them by deleting {tree}, then try again"
            )
        commits = replay(repo, root / "patches", pin.pristine_tree)
        made = repo.tree(commits[-1])
        if made != pin.patched_tree:
            raise LlamamemError(
                f"{root / 'patches' / 'series'}: gives git tree {made}, {LOCK} wants {pin.patched_tree}: "
                "restore both from git, or run `llamamem vendor refresh` after editing the tree"
            )
        # Two-tree read: writes the files that differ and no other, so that a build compiles no more than it must.
        repo.run("update-index", "-q", "--refresh")
        repo.run("read-tree", "-m", "-u", "HEAD", commits[-1])
        repo.run("update-ref", f"refs/heads/{BRANCH}", commits[-1])
        repo.run("symbolic-ref", "HEAD", f"refs/heads/{BRANCH}")
        _Note(inputs, made).write(repo)
        say(f"llama.cpp {pin.upstream_commit[:9]} with {len(commits) - 1} patches in {tree}")
        return True


def is_stale(root: Path | None = None) -> bool:
    """Whether `apply` would have something to do: the tree is missing, or made from another pin or series."""
    root = root or source_root()
    note = _Note.read(Repository(tree_path(root)))
    return note is None or note.inputs != _inputs(root, read_pin(root))


def materialise(root: Path | None = None, say: Say = _stderr) -> Path:
    """What a build calls: `apply`, except that an edited tree is taken as it is, with a word about it."""
    root = root or source_root()
    if edited := edits(root):
        say(f"building llama.cpp with edits that no patch holds: {_few(edited)}")
    else:
        apply(root, say)
    return tree_path(root)


def _few(paths: list[str]) -> str:
    return ", ".join(paths[:5]) + (f" and {len(paths) - 5} more" if len(paths) > 5 else "")


# -- refresh ------------------------------------------------------------------------------------------------------


def refresh(root: Path | None = None, into: str | None = None, say: Say = _stderr) -> list[str]:
    """Write the tree's commits to `patches/` and the lock file; returns the names of the files that changed.

    Edits that are not committed are refused, unless `into` names the patch (`0003` will do) they belong to.
    """
    root = root or source_root()
    tree = tree_path(root)
    if not (tree / ".git").is_dir():
        raise LlamamemError(f"{tree}: there is no tree to refresh from: run `llamamem vendor apply` first")
    with _locked(tree):
        repo = Repository(tree)
        uncommitted = repo.edits()
        if uncommitted and into is None:
            raise LlamamemError(
                f"{tree}: not committed: {', '.join(uncommitted)}: commit them there as a patch of their own, "
                "or name the patch they belong to with --into"
            )
        if uncommitted and into is not None:
            _fold(repo, into)
        patches = export(repo)
        changed = write_series(root / "patches", patches)
        pin = replace(read_pin(root), patched_tree=repo.tree())
        if pin != read_pin(root):
            (root / LOCK).write_text(json.dumps(asdict(pin), indent=2) + "\n", encoding="utf-8")
            changed.append(LOCK.as_posix())
        _Note(_inputs(root, pin), pin.patched_tree).write(repo)
    for name in changed:
        say(f"wrote {name}")
    return changed


def _fold(repo: Repository, into: str) -> None:
    """Put what is not committed into the commit of patch `into`, in a second work tree: no file here is touched."""
    commits = repo.line("rev-list", "--reverse", f"{PRISTINE}..HEAD").split()
    names = [file_name(n, repo.run("log", "-1", "--format=%B", c).decode()) for n, c in enumerate(commits, 1)]
    wanted = into.removesuffix(".patch")
    chosen = [c for name, c in zip(names, commits, strict=True) if wanted in (name[:4], name.removesuffix(".patch"))]
    if len(chosen) != 1:
        raise LlamamemError(f"--into {into}: no such patch; there are: {', '.join(names) or 'none yet'}")
    with repo.scratch_index("HEAD") as scratch:
        scratch.run("add", "--all")
        edited = scratch.line("write-tree")
    fixup = repo.commit_tree(edited, f"fixup! {chosen[0]}\n", repo.line("rev-parse", "HEAD"))
    with tempfile.TemporaryDirectory() as folder:
        beside = Path(folder) / "tree"
        repo.run("worktree", "add", "--quiet", "--detach", str(beside), fixup)
        other = Repository(beside, {"GIT_DIR": str(repo.path / ".git" / "worktrees" / beside.name)})
        try:
            rebase = ["rebase", "--quiet", "--interactive", "--autosquash", PRISTINE]
            other.run(*rebase, GIT_SEQUENCE_EDITOR="true", GIT_EDITOR="true")
            folded = other.line("rev-parse", "HEAD")
        except LlamamemError as error:
            clash = other.run("diff", "--name-only", "--diff-filter=U").decode().split()
            raise LlamamemError(
                f"--into {into}: the edits do not fold into it ({', '.join(clash) or error}): "
                f"commit them on top, or fold them by hand with git rebase in {repo.path}"
            ) from None
        finally:
            repo.run("worktree", "remove", "--force", "--force", str(beside))
    if repo.tree(folded) != edited:
        raise LlamamemError(f"--into {into}: folding would change the result: commit the edits on top instead")
    repo.run("read-tree", folded)
    repo.run("update-ref", "HEAD", folded)
    repo.run("update-index", "-q", "--refresh")


# -- verify -------------------------------------------------------------------------------------------------------


def verify(root: Path | None = None) -> list[str]:
    """What is wrong, one line each: nothing when pristine + series = recorded tree = the files, byte for byte."""
    root = root or source_root()
    tree = tree_path(root)
    if not (tree / ".git").is_dir():
        raise LlamamemError(f"{tree}: there is no tree to verify: run `llamamem vendor apply` first")
    pin, repo = read_pin(root), Repository(tree)
    problems = []
    try:
        made = repo.tree(replay(repo, root / "patches", pin.pristine_tree)[-1])
        if made != pin.patched_tree:
            problems.append(f"patches/series gives git tree {made}, {LOCK} records {pin.patched_tree}")
    except LlamamemError as error:
        problems.append(str(error))
    # A fresh index has no file times in it: every file is read and hashed, whatever its time and size say.
    with repo.scratch_index("HEAD") as scratch:
        changed = set(scratch.edits(ignored=True))
    note = _Note.read(repo)
    if (head := repo.tree()) != pin.patched_tree:
        problems.append(f"the tree's HEAD is git tree {head}, {LOCK} records {pin.patched_tree}")
        if note:
            changed |= _differing(repo, note.tree)
    problems += [f"{path}: differs from the recorded tree" for path in sorted(changed)]
    if not problems and not (note and note.inputs == _inputs(root, pin) and note.tree == pin.patched_tree):
        problems.append(f"{tree}: is not noted as made from these patches: run `llamamem vendor apply`")
    return problems


def identity(root: Path | None = None) -> str:
    """The identity that a build made now would have: an edited tree is marked as such."""
    return build_identity(root) + (EDITED if edits(root) else "")


def _write_header(path: Path, text: str) -> None:
    text = f'#define LLAMAMEM_BUILD_ID "{text}"\n'
    if not path.is_file() or path.read_text(encoding="utf-8") != text:  # an unchanged file compiles nothing again
        path.write_text(text, encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m llamamem.native.vendor", description="What CMake and make call.")
    parser.add_argument("verb", choices=["materialise", "identity", "requirement"])
    parser.add_argument("--header", type=Path, help="with identity: write it to this file as a C macro")
    args = parser.parse_args(argv)
    try:
        if args.verb == "materialise":
            print(materialise())
        elif args.verb == "requirement":
            pin = read_pin(source_root())
            print(f"{pin.requirement} --hash=sha256:{pin.sha256}")
        elif args.header:
            _write_header(args.header, identity())
        else:
            print(identity())
    except LlamamemError as error:
        print(f"llamamem: error: {error}", file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
