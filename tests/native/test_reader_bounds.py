"""What a hostile file can cost: each reader in a process that may take little memory and time, and write nothing.

The seconds are of the processor and far more than are needed: a bound against what never ends, no measure of speed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from hostile.case import add, member, part, put
from hostile.raw import ARRAY, STRING, U32, Sidecar, array, dumps, new_tensor, sound, string, u32, u64

HERE = Path(__file__).parent
HOSTILE = HERE.parent / "data" / "hostile"
SECONDS = 60
MIB = 1 << 20


def verdicts(files: Sequence[tuple[Path, int]], seconds: int = SECONDS) -> dict[str, list[str | None] | str]:
    """For what reason read_sidecar, validate_sidecar and the runtime refuse each file, within so many MiB."""
    done = subprocess.run(
        [sys.executable, HERE / "bounded_readers.py"],
        input="".join(json.dumps([str(path), mib, seconds]) + "\n" for path, mib in files),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {path.name: json.loads(line) for (path, _), line in zip(files, done.stdout.splitlines(), strict=True)}


def test_small_files_cost_little() -> None:
    """The whole corpus: the largest file has 12 KiB."""
    cases = json.loads((HOSTILE / "cases.json").read_text())
    found = verdicts([(HOSTILE / case["file"], 8) for case in cases])
    assert found == {case["file"]: [case["reason"]] * 3 for case in cases}


def with_text(key: str, text: str) -> Sidecar:
    """The smallest sidecar with another JSON text."""
    sidecar = sound()
    put(key, text)(sidecar)
    return sidecar


def with_key(name: str, value: str | bytes, kind: int = STRING) -> Sidecar:
    """And with one more key."""
    sidecar = sound()
    add(name, value, kind)(sidecar)
    return sidecar


def many_keys(n: int, prefix: str = "general.") -> Sidecar:
    """n keys in all."""
    sidecar = sound()
    for i in range(n - len(sidecar.keys)):
        add(f"{prefix}{i}", i, U32)(sidecar)
    return sidecar


def many_tensors(n: int) -> Sidecar:
    """n tensors, of which a layer has a place for 26."""
    sidecar = sound()
    sidecar.tensors += [new_tensor(f"t.{i}", (1,)) for i in range(n - len(sidecar.tensors))]
    sidecar.settle()
    del sidecar.manifest[26:]
    return sidecar


def many_entries(n: int) -> Sidecar:
    """A manifest of n entries of one tensor."""
    sidecar = sound()
    sidecar.manifest[1:1] = [{"name": "blk.0.beta"}] * n
    return sidecar


def many_layers() -> Sidecar:
    """As many target layers as can be, with tensors for one of them."""
    sidecar, layers = sound(), list(range(4096))
    put("target_layers_json", layers)(sidecar)
    member("target_layers", layers)(sidecar)
    sidecar.attention[:] = [sound(layers=[i]).attention[0] for i in layers]
    return sidecar


def long_shape(n: int) -> Sidecar:
    """The shape of a tensor, with dimensions of 1 in front of it."""
    sidecar = sound()
    sidecar.manifest[0]["shape"] = [1] * n + [2]
    return sidecar


def wide_tensor(n: int) -> Sidecar:
    """A tensor that makes a hidden size of n, which no other has."""
    sidecar = sound()
    part("blk.0.mem_v", dims=[n, 1], data=bytes(2 * n))(sidecar)
    sidecar.settle()
    return sidecar


def claims(**edits: int | list[int]) -> bytes:
    """A sound file that says something else of its last tensor."""
    sidecar = sound()
    part(sidecar.tensors[-1].name, **edits)(sidecar)
    return sidecar.compose()


class Large(NamedTuple):
    """`make` gives the file, `nuls` MiB of holes follow; reading it may take `mib`: about half more than it takes."""

    reason: str | None
    mib: int
    make: Callable[[], Sidecar | bytes]
    nuls: int = 0


CONFIG = dumps(sound().config)[:-1]
MEMBERS = ",".join(f'"a{i}":0' for i in range(200_000))
LARGE = {
    "brackets-64-mib": Large("json-size", 288, lambda: with_text("config_json", "[" * (64 * MIB))),
    "brackets-16-mib": Large("json-depth", 96, lambda: with_text("config_json", "[" * (16 * MIB))),
    "lists-in-lists-16-mib": Large(
        "manifest", 1024, lambda: with_text("tensor_manifest_json", f"[{'[[[[[[[]]]]]]],' * MIB}0]")
    ),
    "members-200000": Large("config-unknown", 96, lambda: with_text("config_json", f"{{{MEMBERS}}}")),
    "member-twice": Large("json-duplicate", 96, lambda: with_text("config_json", f'{{{MEMBERS},"a199999":0}}')),
    "digits": Large("json-invalid", 64, lambda: with_text("config_json", f'{CONFIG},"online_gain":{"9" * 4 * MIB}}}')),
    "escapes": Large(
        None, 96, lambda: with_text("config_json", f'{CONFIG},"output_init":"{chr(92)}u00e9{"x" * 8 * MIB}"}}')
    ),
    "keys-65536": Large(None, 32, lambda: many_keys(65_536)),
    "keys-65537": Large("gguf-count", 16, lambda: many_keys(65_537)),
    "keys-unknown": Large("key-unknown", 32, lambda: many_keys(65_536, "x.")),
    "tensors-65536": Large("tensor-unknown", 64, lambda: many_tensors(65_536)),
    "entries-200000": Large("manifest", 96, lambda: many_entries(200_000)),
    "layers-4096": Large("tensor-missing", 16, many_layers),
    "shape-of-ones": Large(None, 96, lambda: long_shape(1_000_000)),
    "strings-1000000": Large(
        None, 32, lambda: with_key("general.tags", array(STRING, bytes(8_000_000), 1_000_000), ARRAY)
    ),
    "string-64-mib": Large(None, 288, lambda: with_key("delta_mem.status", "x" * (64 * MIB))),
    "tensor-64-mib": Large("attention", 224, lambda: wide_tensor(32 * MIB)),
    "nuls": Large("not-gguf", 160, lambda: b"", nuls=100),
    "nuls-after-header": Large("key-duplicate", 160, lambda: b"GGUF" + u32(3) + u64(1) + u64(65_536), nuls=100),
    "nuls-after-tensors": Large("trailing-bytes", 160, lambda: sound().compose(), nuls=100),
    "too-large": Large("too-large", 8, lambda: sound().compose(), nuls=1024),
    # what a file only says that it has
    "claims-65536-keys": Large("truncated", 8, lambda: b"GGUF" + u32(3) + u64(0) + u64(65_536)),
    "claims-keys": Large("gguf-count", 8, lambda: b"GGUF" + u32(3) + u64(0) + u64((1 << 64) - 1)),
    "claims-65536-tensors": Large("not-a-sidecar", 8, lambda: b"GGUF" + u32(3) + u64(65_536) + u64(0)),
    "claims-a-string": Large("truncated", 8, lambda: b"GGUF" + u32(3) + u64(0) + u64(1) + string(b"x", (1 << 30) - 64)),
    "claims-strings": Large("truncated", 8, lambda: with_key("general.tags", array(STRING, b"", 1 << 60), ARRAY)),
    "claims-values": Large("truncated", 8, lambda: claims(dims=[1 << 48])),
    "claims-dimensions": Large("tensor-dims", 8, lambda: claims(n_dims=(1 << 32) - 1)),
}


def write(path: Path, large: Large) -> None:
    """Writes the file."""
    made = large.make()
    with path.open("wb") as file:
        file.write(made.compose() if isinstance(made, Sidecar) else made)
        file.truncate(file.tell() + large.nuls * MIB)


@pytest.mark.slow
def test_large_files_cost_no_more_than_their_size_allows(tmp_path: Path) -> None:
    """JSON takes the most: 16 MiB of lists in lists become 700 MiB in Python, and 500 MiB in the runtime."""
    paths = [tmp_path / name for name in LARGE]
    try:
        for path, large in zip(paths, LARGE.values(), strict=True):
            write(path, large)
        found = verdicts([(path, LARGE[path.name].mib) for path in paths])
    finally:
        for path in paths:
            path.unlink(missing_ok=True)
    assert found == {name: [large.reason] * 3 for name, large in LARGE.items()}


def test_objects_cost_no_more_than_their_size_allows(tmp_path: Path) -> None:
    path = tmp_path / "objects.gguf"
    path.write_bytes(with_text("tensor_manifest_json", f"[{'{},' * MIB}0]").compose())
    assert verdicts([(path, 192)], seconds=20) == {path.name: ["manifest"] * 3}


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    missing = tmp_path / "missing.gguf"
    assert verdicts([(missing, 8), (tmp_path, 8)]) == {path.name: ["unreadable"] * 3 for path in (missing, tmp_path)}


def test_what_never_ends_is_no_file() -> None:
    assert verdicts([(Path("/dev/zero"), 8)]) == {"zero": ["unreadable"] * 3}
