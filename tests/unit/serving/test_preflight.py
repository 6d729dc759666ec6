from __future__ import annotations

import hashlib
import os
import shutil
import socket
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from llamamem.errors import LlamamemError
from llamamem.serving import preflight
from llamamem.serving.machine import Processors
from llamamem.serving.profiles import Plan, make_plan

MODEL_A = Path(__file__).parents[2] / "data" / "model_a"

GEMMA = {
    "general.architecture": "gemma4",
    "gemma4.block_count": 4,
    "gemma4.context_length": 4096,
    "gemma4.attention.head_count_kv": 2,
    "gemma4.attention.key_length": 32,
    "gemma4.attention.value_length": 32,
    "gemma4.attention.key_length_swa": 16,
    "gemma4.attention.value_length_swa": 16,
    "gemma4.attention.sliding_window": 64,
    "gemma4.attention.shared_kv_layers": 1,
    "gemma4.attention.sliding_window_pattern": [True, True, False, True],
}


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def gguf(fields: dict[str, Any]) -> bytes:
    out = b"GGUF" + struct.pack("<IQQ", 3, 0, len(fields))
    for key, value in fields.items():
        out += text(key)
        if isinstance(value, str):
            out += struct.pack("<I", 8) + text(value)
        elif isinstance(value, list) and isinstance(value[0], str):
            out += struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(text, value))
        elif isinstance(value, list):
            out += struct.pack(f"<IIQ{len(value)}?", 9, 7, len(value), *value)
        else:
            out += struct.pack("<II", 4, value)
    return out


@dataclass
class Case:
    """A plan over real files: the tiny Gemma 4 and a sidecar that is bound to it."""

    directory: Path
    fake_bin: Path
    base: Path
    sidecar: Path

    def plan(self, **kwargs: Any) -> Plan:
        given = {"bin_dir": self.fake_bin, "sidecar": self.sidecar, "port": 0, "environ": {}, **kwargs}
        return make_plan(given.pop("model", self.base), **given)


@pytest.fixture
def case(fake_bin: Path, tmp_path: Path) -> Case:
    base, sidecar = tmp_path / "model.gguf", tmp_path / "side.gguf"
    shutil.copy(MODEL_A / "model-f32.gguf", base)
    shutil.copy(MODEL_A / "sidecar-v1.gguf", sidecar)
    return Case(tmp_path, fake_bin, base, sidecar)


def refusal(plan: Plan) -> str:
    with pytest.raises(LlamamemError) as caught:
        preflight.check(plan)
    assert caught.value.exit_status == 2 and "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_right_passes_and_both_hashes_are_known(case: Case) -> None:
    checked = preflight.check(case.plan(slot_dir=case.directory / "new" / "slots"))
    assert checked.base_sha256 == hashlib.sha256(case.base.read_bytes()).hexdigest()
    assert checked.sidecar_sha256 == hashlib.sha256(case.sidecar.read_bytes()).hexdigest()
    assert (case.directory / "new" / "slots").is_dir()


def test_parts_of_a_base_that_are_missing_are_named(case: Case) -> None:
    first = case.directory / "base-00001-of-00003.gguf"
    first.write_bytes(gguf({**GEMMA, "split.count": 3}))
    for plan in (case.plan(model=first), case.plan(model=first, sidecar=None)):
        assert "base-00002-of-00003.gguf, base-00003-of-00003.gguf not among them" in refusal(plan)
    for number in (2, 3):
        part = case.directory / f"base-0000{number}-of-00003.gguf"
        part.write_bytes(gguf({**GEMMA, "split.count": 3, "split.no": number - 1}))
    preflight.check(case.plan(model=first, sidecar=None))
    assert "give the first, base-00001-of-00003.gguf" in refusal(case.plan(model=part, sidecar=None))


def test_the_base_is_compared_before_it_is_hashed(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashing takes minutes: whatever the headers tell is told first."""

    def hashed(*args: object) -> str:
        raise AssertionError("the base was hashed")

    monkeypatch.setattr(preflight.digests, "base_sha256", hashed)
    case.base.write_bytes(case.base.read_bytes().replace(b"gemma4", b"gemma3"))
    assert "architecture is 'gemma3'" in refusal(case.plan())


def test_a_taken_port_is_refused_and_says_by_whom(case: Case) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = refusal(case.plan(port=port))
    assert f"--port {port}: taken by " in said and f"(pid {os.getpid()})" in said
    preflight.check(case.plan(port=port))  # free again


def test_a_slot_directory_that_cannot_be_written(case: Case) -> None:
    file = case.directory / "file"
    file.touch()
    assert f"--slot-dir {file}" in refusal(case.plan(slot_dir=file))


def test_the_slot_directory_is_the_owners_alone_also_one_that_was_there(case: Case) -> None:
    slots = case.directory / "slots"
    slots.mkdir()
    slots.chmod(0o755)
    preflight.check(case.plan(slot_dir=slots))
    assert slots.stat().st_mode & 0o077 == 0


def test_a_server_for_everybody_without_a_key_is_warned_of(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    (warning,) = preflight.check_open(case.plan(host="0.0.0.0"))
    assert "--host 0.0.0.0 and no key" in warning and "--api-key" in warning
    assert preflight.check_open(case.plan(host="0.0.0.0", extra=["--api-key", "x"])) == ()
    assert preflight.check_open(case.plan(host="0.0.0.0", extra=["--api-key-file=x"])) == ()
    for host in ("127.0.0.1", "localhost", "::1"):
        assert preflight.check_open(case.plan(host=host)) == ()
    monkeypatch.setenv("LLAMA_API_KEY", "x")
    assert preflight.check_open(case.plan(host="0.0.0.0")) == ()


def test_options_in_a_config_file_are_refused_as_on_the_command_line(case: Case) -> None:
    config = Path(os.environ["XDG_CONFIG_HOME"]) / "llama.cpp" / "config.ini"
    config.parent.mkdir(parents=True)
    config.write_text("[*]\n# ub = 4\nthreads = 2\nubatch-size = 64\nLLAMA_ARG_CACHE_REUSE = 8\n")
    said = refusal(case.plan())
    assert "ubatch-size, LLAMA_ARG_CACHE_REUSE," in said and "threads" not in said
    config.write_text("[*]\nubatch-size = 64\n")
    preflight.check(case.plan(profile="fused"))


def test_memory_is_estimated_as_the_sliding_window_cache_is_laid_out(case: Case) -> None:
    plan = case.plan(ctx_size=1000)
    weights = case.base.stat().st_size + case.sidecar.stat().st_size
    # three layers with a cache: two slide (window 64 + 512 cells, 16 + 16 wide), one is full; two heads, f16
    kv = 2 * 2 * (2 * 576 * 32 + 1000 * 64)
    assert preflight.memory_need(plan, GEMMA) == weights + kv + (256 << 20)
    f32 = case.plan(ctx_size=1000, extra=["-ctk", "f32", "--cache-type-v", "f32"])
    assert preflight.memory_need(f32, GEMMA) == weights + 2 * kv + (256 << 20)


def test_too_little_memory_is_refused_and_little_is_warned_of(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = case.plan()
    need = preflight.memory_need(plan, GEMMA)

    def available(n: float) -> None:
        class Memory:
            available = int(n)

        monkeypatch.setattr(preflight.psutil, "virtual_memory", lambda: Memory)

    available(0.9 * need)
    assert "--no-memory-check" in refusal(plan)
    assert preflight.check(plan, memory_check=False).warnings
    available(1.1 * need)
    assert "GiB" in preflight.check(plan).warnings[0]
    available(1.3 * need)
    assert preflight.check(plan).warnings == ()


def test_a_context_that_the_model_has_not_is_warned_of(case: Case) -> None:
    """llama-server makes it shorter, and says so in its log alone."""
    (warning,) = preflight.check_context(case.plan(ctx_size=4097), GEMMA)
    assert "--ctx-size 4097" in warning and "4096 tokens" in warning
    assert preflight.check_context(case.plan(ctx_size=4096), GEMMA) == ()
    assert preflight.check_context(case.plan(profile="batched", parallel=2, ctx_size=8192), GEMMA) == ()


def test_more_threads_than_may_be_used_are_warned_of(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    few = Processors(2, 8, "the cgroup's quota of 2.5 processors")
    monkeypatch.setattr(preflight, "processors", lambda: few)
    (warning,) = preflight.check_threads(case.plan(extra=["--threads", "3"]))
    assert "--threads 3: 2 may be used here" in warning
    assert preflight.check_threads(case.plan(extra=["--threads", "2"])) == ()
    assert preflight.check_threads(case.plan()) == ()


def test_a_file_that_is_written_to_while_it_is_hashed_is_not_remembered(tmp_path: Path) -> None:
    path = tmp_path / "big"
    path.write_bytes(b"a" * 100)

    def write(done: int, total: int) -> None:
        path.write_bytes(b"b" * 101)

    with pytest.raises(LlamamemError, match="was changed while it was hashed"):
        preflight.file_sha256(path, write)
    assert preflight.file_sha256(path) == hashlib.sha256(b"b" * 101).hexdigest()


def test_a_digest_is_remembered_until_the_file_changes(tmp_path: Path) -> None:
    path = tmp_path / "big"
    path.write_bytes(b"a" * 100)
    seen: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        seen.append((done, total))

    first = preflight.file_sha256(path, progress)
    assert first == hashlib.sha256(b"a" * 100).hexdigest() and seen == [(100, 100)]
    assert preflight.file_sha256(path, progress) == first and len(seen) == 1
    path.write_bytes(b"b" * 100)
    os.utime(path, ns=(1, 1))
    assert preflight.file_sha256(path, progress) == hashlib.sha256(b"b" * 100).hexdigest()


def test_a_damaged_digest_cache_is_as_good_as_none(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"x")
    for damage in ("{", "[]", '{"a": 1}'):
        cache = Path(os.environ["XDG_CACHE_HOME"]) / "llamamem" / "digests.json"
        cache.parent.mkdir(parents=True, exist_ok=True)
        cache.write_text(damage)
        assert preflight.file_sha256(path) == hashlib.sha256(b"x").hexdigest()
