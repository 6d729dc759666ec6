"""`llamamem serve` refuses: each row of the preflight list, its line, exit status 2, and that nothing was started."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llamamem.serving import preflight

DATA = Path(__file__).parents[2] / "data"
Run = Callable[..., Any]


class Bench:
    """What a user has: a build, a base, a sidecar for it; a row of the list breaks one of them."""

    def __init__(self, directory: Path, fake_bin: Path) -> None:
        self.directory = directory
        self.fake_bin = fake_bin
        self.binary = fake_bin / "llama-server"
        self.base = Path(shutil.copy(DATA / "model_a" / "model-f32.gguf", directory / "model.gguf"))
        self.sidecar = Path(shutil.copy(DATA / "model_a" / "sidecar-v1.gguf", directory / "side.gguf"))
        self.args: list[str] = ["--port", "0"]
        self.extra = ["--fake", "crash"]  # a row that is not refused shall not serve for ever

    def command(self) -> list[str]:
        files = ["--model", str(self.base), "--sidecar", str(self.sidecar), "--bin-dir", str(self.fake_bin)]
        return ["serve", *files, *self.args, "--", *self.extra]

    def hostile(self, name: str) -> None:
        shutil.copy(DATA / "hostile" / f"{name}.gguf", self.sidecar)

    def edit_base(self, key: bytes, skip: int, value: bytes) -> None:
        data = bytearray(self.base.read_bytes())
        at = data.index(key) + len(key) + skip
        data[at : at + len(value)] = value
        self.base.write_bytes(data)


@pytest.fixture
def bench(tmp_path: Path, fake_bin: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    for name in [name for name in os.environ if name.startswith("LLAMA_")]:
        monkeypatch.delenv(name)
    return Bench(tmp_path, fake_bin)


@pytest.fixture
def refused(bench: Bench, llamamem: Run, tmp_path: Path) -> Callable[..., str]:
    """The line with which the command as it stands is refused."""

    def run() -> str:
        done = llamamem(*bench.command())
        assert done.status == 2 and done.out == ""
        assert done.err.startswith("llamamem: error: ") and done.err.count("\n") == 1 and done.err.endswith("\n")
        assert not (tmp_path / "started").exists(), "llama-server was started"
        runs = Path(os.environ["XDG_STATE_HOME"]) / "llamamem" / "runs"
        assert not runs.exists() or not list(runs.iterdir()), "a run was recorded"
        return str(done.err)

    return run


def test_nothing_is_refused_of_what_is_right(bench: Bench, llamamem: Run, tmp_path: Path) -> None:
    """Or else every test below would pass for some reason of its own."""
    done = llamamem(*bench.command())
    assert done.status == 2 and "tensor blk.0.x is missing" in done.err
    assert (tmp_path / "started").read_text().count("\n") == 1


# -- the binary


def test_binary_missing(bench: Bench, refused: Callable[[], str], monkeypatch: pytest.MonkeyPatch) -> None:
    bench.binary.unlink()
    said = refused()
    assert str(bench.fake_bin) in said and "missing" in said and "llamamem build" in said


def test_binary_is_stock(
    bench: Bench, refused: Callable[[], str], identity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.binary.write_text("#!/bin/sh\necho 'version: 8000 (abc)' >&2\n")
    said = refused()
    assert str(bench.fake_bin) in said and "not llamamem's build" in said and identity in said


def test_binary_of_another_patch_set(
    bench: Bench, refused: Callable[[], str], identity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_IDENTITY", "0123456789+0123456789ab")
    said = refused()
    assert "0123456789+0123456789ab" in said and identity in said


def test_binary_was_replaced_after_it_was_built(
    bench: Bench, refused: Callable[[], str], identity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The note beside a build still says that it is ours; the binary itself is asked."""
    from llamamem.cli import serve
    from llamamem.native.build import Build

    build = Build(bench.directory, bench.fake_bin, bench.fake_bin, "cpu", identity)
    monkeypatch.setattr(serve, "find_build", lambda **kwargs: build)
    bench.binary.write_text("#!/bin/sh\necho 'version: 8000 (abc)' >&2\n")
    said = refused()
    assert str(bench.binary) in said and "not llamamem's patched build" in said and "run `llamamem build`" in said
    bench.binary.chmod(0o644)
    assert "is not executable" in refused()
    bench.binary.unlink()
    assert "no such binary; run `llamamem build`" in refused()


# -- base and sidecar


@pytest.mark.parametrize("which", ["base", "sidecar"])
@pytest.mark.parametrize(
    "broken, said",
    [
        (lambda path: path.unlink(), "no such file; check the path"),
        (lambda path: (path.unlink(), path.mkdir()), "cannot be read (Is a directory)"),
        (lambda path: (path.unlink(), os.mkfifo(path)), "cannot be read (not a regular file)"),
        (lambda path: (path.unlink(), path.symlink_to("/dev/zero")), "cannot be read (not a regular file)"),
        (lambda path: path.write_bytes(b"PK\3\4" * 20), "is not a GGUF file"),
        (lambda path: path.write_bytes(b""), "is not a GGUF file"),
        (lambda path: path.write_bytes(path.read_bytes()[:2000]), "cut short"),
        (lambda path: path.write_bytes(path.read_bytes()[:-200]), "ends at byte"),
        (lambda path: path.write_bytes(b"GGUF\1" + path.read_bytes()[5:]), "GGUF version 1 is not supported"),
    ],
    ids=["missing", "directory", "pipe", "device", "no gguf", "empty", "header cut short", "data cut short", "version"],
)
def test_a_file_that_is_none(
    bench: Bench, refused: Callable[[], str], which: str, broken: Callable[[Path], Any], said: str
) -> None:
    path: Path = getattr(bench, which)
    broken(path)
    line = refused()
    assert f"{which} {path}: " in line and said in line


@pytest.mark.parametrize("which, said", [("base", "is not a GGUF file"), ("sidecar", "is over 1024 MiB")])
def test_2_gib_of_nothing(bench: Bench, refused: Callable[[], str], which: str, said: str) -> None:
    path: Path = getattr(bench, which)
    path.write_bytes(b"")
    os.truncate(path, 2 << 30)
    assert said in refused()


@pytest.mark.parametrize("which", ["base", "sidecar"])
def test_a_file_that_may_not_be_read(
    bench: Bench, refused: Callable[[], str], which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """root reads everything, so the file system says no by a stand-in."""
    path: Path = getattr(bench, which)
    opened = os.open

    def deny(name: Any, *args: Any, **kwargs: Any) -> int:
        if name == path:
            raise PermissionError(13, "Permission denied", str(name))
        return opened(name, *args, **kwargs)

    monkeypatch.setattr(os, "open", deny)
    line = refused()
    assert f"{which} {path}: " in line and "cannot be read (Permission denied)" in line


@pytest.mark.parametrize(
    "name, reason", [("alpha-nan", "key-value"), ("base-sha256-empty", "key-value"), ("alignment-64", "alignment")]
)
def test_a_refused_sidecar_is_refused_with_its_reason(
    bench: Bench, refused: Callable[[], str], name: str, reason: str
) -> None:
    bench.hostile(name)
    line = refused()
    assert f"sidecar {bench.sidecar}: [{reason}]" in line and f"llamamem sidecar validate {bench.sidecar}" in line


@pytest.mark.parametrize(
    "key, skip, value, said",
    [
        (b"general.architecture", 12, b"gemma3", "architecture is 'gemma3'"),
        (b"gemma4.attention.sliding_window_pattern", 16, b"\0", "tensor 'blk.0.attn_q.weight' has shape"),
    ],
    ids=["architecture", "keys and tensors disagree"],
)
def test_a_base_of_another_make_is_refused_by_its_header(
    bench: Bench, refused: Callable[[], str], key: bytes, skip: int, value: bytes, said: str
) -> None:
    bench.edit_base(key, skip, value)
    line = refused()
    assert f"base {bench.base}: " in line and said in line and "give the base that the sidecar was made for" in line
    assert "SHA-256" not in line  # it is not hashed for this


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda s: {"hidden": 32}, "hidden size is 64, the sidecar is for 32"),
        (lambda s: {"layers": (replace(s.layers[0], q_out=32), *s.layers[1:])}, "layer 0: q_out is 64"),
        (lambda s: {"layers": (replace(s.layers[0], layer=99),)}, "layer 99 is a target"),
        (lambda s: {"layers": (replace(s.layers[0], layer=6),), "delta_heads": ("k",)}, "delta head k is active"),
    ],
    ids=["hidden size", "width", "layer", "heads"],
)
def test_a_base_of_other_figures_is_refused(
    bench: Bench,
    refused: Callable[[], str],
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Any], dict[str, Any]],
    said: str,
) -> None:
    sidecar = preflight.read_sidecar(bench.sidecar)
    monkeypatch.setattr(preflight, "read_sidecar", lambda path: replace(sidecar, **change(sidecar)))
    line = refused()
    assert f"base {bench.base}: " in line and said in line and "SHA-256" not in line


def test_a_base_other_than_the_bound_one_is_refused_with_both_hashes(bench: Bench, refused: Callable[[], str]) -> None:
    from llamamem.formats.base import file_sha256

    bound = file_sha256(bench.base)
    data = bytearray(bench.base.read_bytes())
    data[-1] ^= 1
    bench.base.write_bytes(data)
    line = refused()
    assert bound in line and file_sha256(bench.base) in line and "give the base that the sidecar was made for" in line


# -- the place


def test_port_taken_and_by_whom(bench: Bench, refused: Callable[[], str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        bench.args = ["--port", str(port)]
        line = refused()
    assert f"--port {port}: taken by " in line and f"(pid {os.getpid()})" in line and "give another port" in line


def test_port_that_is_none(bench: Bench, refused: Callable[[], str]) -> None:
    bench.args = ["--port", "65536"]
    assert "--port 65536: not a port" in refused()


@pytest.mark.parametrize(
    "host, said", [("no.such.host.invalid", "cannot be resolved"), ("203.0.113.7", "cannot listen there")]
)
def test_host_that_is_not_here(bench: Bench, refused: Callable[[], str], host: str, said: str) -> None:
    bench.args = ["--port", "18080", "--host", host]
    line = refused()
    assert f"--host {host}: {said}" in line


def test_slot_directory_not_writable(bench: Bench, refused: Callable[[], str]) -> None:
    file = bench.directory / "file"
    file.touch()
    for place in (file, file / "below", Path("/proc/1/slots")):
        bench.args = ["--port", "0", "--slot-dir", str(place)]
        line = refused()
        assert f"--slot-dir {place}: not writable" in line and "give a directory of yours" in line


def test_not_enough_memory(bench: Bench, refused: Callable[[], str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Memory:
        available = 1 << 20

    monkeypatch.setattr(preflight.psutil, "virtual_memory", lambda: Memory)
    line = refused()
    assert str(bench.base) in line and "0.0 GiB are free" in line and "--no-memory-check" in line


# -- what the profile owns


@pytest.mark.parametrize("profile", ["serial", "fused", "batched"])
def test_owned_options_all_named_at_once(
    bench: Bench, refused: Callable[[], str], profile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_ARG_CACHE_REUSE", "8")
    monkeypatch.setenv("AIP_HTTP_PORT", "1")
    bench.args += ["--profile", profile]
    bench.extra += ["-md", "draft.gguf", "--rwkv_ms_mode=fused", "-t", "2"]
    line = refused()
    for name in ("-md", "--rwkv_ms_mode=fused", "LLAMA_ARG_CACHE_REUSE in the environment", "AIP_HTTP_PORT"):
        assert name in line
    assert "-t (" not in line and "no profile" not in line.partition("-md")[0]


def test_owned_options_of_a_config_file(bench: Bench, refused: Callable[[], str]) -> None:
    config = Path(os.environ["XDG_CONFIG_HOME"]) / "llama.cpp" / "config.ini"
    config.parent.mkdir(parents=True)
    config.write_text("[*]\nubatch-size = 64\n")
    line = refused()
    assert f"{config}: sets ubatch-size, owned by profile serial" in line


def test_no_room_for_log_and_record(bench: Bench, refused: Callable[[], str], tmp_path: Path) -> None:
    runs = Path(os.environ["XDG_STATE_HOME"])
    runs.write_text("a file where a directory must be")
    bench.args += ["--slot-dir", str(tmp_path / "slots")]
    line = refused()
    assert "cannot hold the log and record of a run" in line and "XDG_STATE_HOME" in line
