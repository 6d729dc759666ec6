"""The sidecar GGUF: reading one, and everything that it is refused for. docs/sidecar.md is what it must be.

All format versions and kinds of memory.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from llamamem.errors import LlamamemError
from llamamem.formats.findings import Enough, Finding, Findings
from llamamem.formats.gguf_file import GgufField, GgufTensor, read_gguf
from llamamem.formats.sidecar.base import check_base
from llamamem.formats.sidecar.keys import Said, read_keys
from llamamem.formats.sidecar.layout import ARCHITECTURES, DELTA_CHUNK, HF_ROWS, NORM_ROWS, Sidecar
from llamamem.formats.sidecar.tensors import check_tensors


@dataclass(frozen=True)
class Validation:
    """What is wrong with a sidecar; `sidecar` is None if it is the file itself, not only its base."""

    sidecar: Sidecar | None
    findings: tuple[Finding, ...]


def read_sidecar(path: str | Path) -> Sidecar:
    """Reads and checks a sidecar file, without its base.

    Raises LlamamemError with the reason of the first fault, naming the file and the key or tensor.
    """
    path, faults = Path(path), Findings(limit=1)
    with suppress(Enough):
        content = faults.attempt(read_gguf, path, ARCHITECTURES)
        assert content is not None
        return _checked(path, *content, faults)
    raise _refusal(path, faults)


def check_sidecar(path: Path, fields: dict[str, GgufField], tensors: dict[str, GgufTensor]) -> Sidecar:
    """The same for keys and tensors that are in no file yet. `path` is only named in errors."""
    faults = Findings(limit=1)
    with suppress(Enough):
        return _checked(path, fields, tensors, faults)
    raise _refusal(path, faults)


def validate_sidecar(
    path: str | Path, base: str | Path | None = None, progress: Callable[[int], None] | None = None
) -> Validation:
    """All that is wrong with a sidecar: at most 1000 findings, in the order of docs/sidecar.md.

    With `base` also what is wrong with that; `progress` is told its bytes as they are hashed. Raises LlamamemError
    without a reason if the base cannot be read.
    """
    path, faults = Path(path), Findings()
    sidecar = None
    with suppress(Enough):
        content = faults.attempt(read_gguf, path, ARCHITECTURES)
        said = None if content is None else read_keys(content[0], faults)
        if content is not None and said is not None:
            hidden = check_tensors(said, content[1], faults)
            if not faults.found:
                sidecar = _sidecar(path, *content, said, hidden)
            if base is not None:
                check_base(path, said, hidden, Path(base), faults, progress)
    return Validation(sidecar, tuple(faults.found))


def _refusal(path: Path, faults: Findings) -> LlamamemError:
    """To be raised where Enough is over: while it is handled, the bytes of the whole file hang on it."""
    first = faults.found[0]
    return LlamamemError(f"{path}: [{first.reason}] {first.message}", reason=first.reason)


def _checked(path: Path, fields: dict[str, GgufField], tensors: dict[str, GgufTensor], faults: Findings) -> Sidecar:
    """Of `faults` that end with the first one: what is returned has none."""
    said = read_keys(fields, faults)
    assert said is not None
    return _sidecar(path, fields, tensors, said, check_tensors(said, tensors, faults))


def _sidecar(
    path: Path, fields: dict[str, GgufField], tensors: dict[str, GgufTensor], said: Said, hidden: int | None
) -> Sidecar:
    assert hidden is not None and said.delta_heads is not None and said.layers is not None
    return Sidecar(
        path=path,
        format_version=said.format_version,
        kind=said.kind,
        base_arch=said.base_arch,
        source_prefix=said.source_prefix,
        row_order=NORM_ROWS if said.rope_head_dim else HF_ROWS,
        rope_head_dim=said.rope_head_dim,
        semantics=said.semantics or 0,
        rank=said.sizes["rank"],
        heads=said.sizes["num_state_heads"],
        states=said.sizes.get("rwkv_ms_num_states", 1),
        chunk=said.sizes.get("rwkv_ms_chunk_size", DELTA_CHUNK),
        alpha=said.alpha,
        erase_gate=1.0 if said.erase_gate is None else said.erase_gate,
        update_mode=said.update_mode,
        couple_lambda=said.couple_lambda,
        normalize_qk=said.normalize_qk,
        o_norm_eps=said.o_norm_eps if said.o_norm else None,
        scale_max=said.scale_max if said.scaled else None,
        hidden=hidden,
        delta_heads=tuple(said.delta_heads),
        layers=tuple(layer for layer in said.layers.values() if layer is not None),
        base_sha256=said.base_sha256,
        config=said.config,
        fields=fields,
        tensors=tensors,
    )
