"""A nested git repository that depends on nothing of the user's: the few commands the vendored tree needs."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from llamamem.errors import LlamamemError

__all__ = ["Repository"]

_CONFIG = {
    "core.autocrlf": "false",
    "core.fileMode": "true",
    "core.hooksPath": "/dev/null",
    "core.attributesFile": "/dev/null",
    "core.excludesFile": "/dev/null",
    "commit.gpgSign": "false",
    "gc.auto": "0",
    "user.name": "llamamem",
    "user.email": "llamamem@localhost",
}
# One name and date for every commit made here: the same pin and series give the same commit ids everywhere.
_ENV = {
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_OPTIONAL_LOCKS": "0",  # `git status` must not touch the index: upstream's CMake configures again when it does
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_AUTHOR_NAME": "llamamem",
    "GIT_AUTHOR_EMAIL": "llamamem@localhost",
    "GIT_AUTHOR_DATE": "2000-01-01T00:00:00Z",
    "GIT_COMMITTER_NAME": "llamamem",
    "GIT_COMMITTER_EMAIL": "llamamem@localhost",
    "GIT_COMMITTER_DATE": "2000-01-01T00:00:00Z",
    "LC_ALL": "C",
}


@dataclass(frozen=True)
class Repository:
    """`path` is a work tree with its own `.git`; `env` adds to the environment of every command."""

    path: Path
    env: dict[str, str] = field(default_factory=dict)

    def run(self, *args: str, data: bytes | None = None, **env: str) -> bytes:
        """Standard output of `git ARGS`; a failure is a `LlamamemError` with git's own words."""
        git = shutil.which("git")
        if git is None:
            raise LlamamemError("git was not found on PATH: install it: it lays the patches over the pinned llama.cpp")
        outer = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        # GIT_DIR is set, so that a missing nested repository is an error and never the one around it.
        here = {"GIT_DIR": str(self.path / ".git"), "GIT_WORK_TREE": str(self.path)}
        done = subprocess.run(
            [git, *args],
            cwd=self.path,
            env=outer | _ENV | here | self.env | env,
            input=data,
            capture_output=True,
            check=False,
        )
        if done.returncode:
            words = (done.stderr or done.stdout).decode(errors="replace")
            raise LlamamemError(f"{self.path}: git {args[0]} failed: {words}")
        return done.stdout

    def line(self, *args: str, data: bytes | None = None) -> str:
        return self.run(*args, data=data).decode().strip()

    def init(self, branch: str) -> None:
        self.run("init", "--quiet", "--object-format=sha1", f"--initial-branch={branch}", "--template=")
        for name, value in _CONFIG.items():
            self.run("config", name, value)
        info = self.path / ".git" / "info"
        info.mkdir(exist_ok=True)
        (info / "attributes").write_text("* -text -eol -ident -filter -working-tree-encoding\n", encoding="utf-8")
        (info / "exclude").write_text("__pycache__/\n*.pyc\n", encoding="utf-8")

    def tree(self, commit: str = "HEAD") -> str:
        return self.line("rev-parse", "--verify", f"{commit}^{{tree}}")

    def commit_tree(self, tree: str, message: str, parent: str | None = None) -> str:
        return self.line("commit-tree", tree, *(["-p", parent] if parent else []), data=message.encode())

    def edits(self, *, ignored: bool = False) -> list[str]:
        """Paths that differ from HEAD, untracked ones too; with `ignored`, those that `.gitignore` hides as well."""
        flags = ["--porcelain=v1", "-z", "--no-renames", "--untracked-files=all"]
        entries = self.run("status", *flags, *(["--ignored"] if ignored else [])).decode().split("\0")
        paths = (entry[3:] for entry in entries if entry)
        return sorted(path for path in paths if "__pycache__" not in path and not path.endswith(".pyc"))

    @contextmanager
    def scratch_index(self, tree: str | None = None) -> Iterator[Repository]:
        """The same repository with a throw-away index that holds `tree`: work on trees without touching a file."""
        with tempfile.TemporaryDirectory() as folder:
            scratch = Repository(self.path, self.env | {"GIT_INDEX_FILE": str(Path(folder) / "index")})
            scratch.run("read-tree", *([tree] if tree else ["--empty"]))
            yield scratch
