"""A saved state: llama.cpp's file of a sequence or a context with the memory's block in it, or that block alone.

docs/state-format.md has it by byte, with the reasons for a refusal in their order. `state-has-memory` and `state-kv`
need a running model: only the runtime gives them.
"""

from __future__ import annotations

import hashlib
import io
import os
import struct
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llamamem.errors import LlamamemError
from llamamem.formats.base import file_sha256
from llamamem.formats.findings import quoted
from llamamem.formats.gguf_file import replacing
from llamamem.formats.regular import NotRegular, open_regular
from llamamem.formats.sidecar import DELTA_CHUNK, DELTA_RULE, RWKV_MS, Sidecar
from llamamem.formats.state.block import (
    CHECKPOINT,
    CHECKSUM,
    CONTEXT,
    GGSN,
    GGSQ,
    KINDS,
    LLAMA_VERSION,
    MADE_BY_TOOL,
    MEMORY,
    ORIGINS,
    SEQUENCE,
    SETTING,
    TRAILER,
    VERSION,
    Header,
    RawState,
    read_raw,
    refused,
)

_VALUES = 12 + 320  # bytes before the values of a memory alone: the heads of file and block
_MAX_LAPS = 1 << 24  # f32 counts no further by ones
_MAX_PERIOD = _MAX_STATE = 1 << 24  # as a sidecar's
_SETTING = struct.Struct("<fIQ")
_FLAGS = {
    SEQUENCE: MADE_BY_TOOL | ORIGINS | SETTING,
    CONTEXT: MADE_BY_TOOL | ORIGINS,
    CHECKPOINT: MADE_BY_TOOL | ORIGINS | SETTING,
    MEMORY: MADE_BY_TOOL,
}
_LIMITS = {"layers": 4096, "heads": 64, "states": 1024, "rank": 256, "chunk": 1 << 24}


class Setting(NamedTuple):
    """What a text was computed under: only read, a factor of the deltas, a hash of the scales of LoRA adapters."""

    scale: float
    frozen: bool
    lora: int


@dataclass(frozen=True, eq=False)
class State:
    """The memory of one sequence or several, and what a file says of it. The KV cache of a file is not kept.

    N state heads, M states a head, R rank. `layers` counts target layers; the sidecar knows their numbers.
    """

    S: np.ndarray  # f32 [cells, layers, N, M, R, R], as S[n, m, i, j] of the specification
    prev: np.ndarray  # f32 [cells, layers, N*R]: the source of the last token written; of a delta rule [.., 0]
    tokens_written: np.ndarray  # int64 [cells, layers]
    chunk: int  # C, tokens; of a delta rule, whose counter is for display, DELTA_CHUNK
    semantics: int  # of an RWKV-MS; 0: a delta rule
    sidecar_sha256: str
    base_sha256: str
    kind: int = MEMORY
    flags: int = 0
    provenance: str = ""
    token_ids: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))  # i32 [n]
    architecture: str = ""  # of a whole context
    kv_bytes: int = 0
    setting: Setting | None = None  # that the text was computed under; None: the default
    origin_tokens: np.ndarray | None = None  # int64 [cells, layers]: tokens written to what each started with
    path: Path | None = None
    size: int = 0  # bytes of the file
    sha256: str = ""  # of the whole file

    @property
    def cells(self) -> int:
        return int(self.S.shape[0])

    @property
    def layers(self) -> int:
        return int(self.S.shape[1])

    @property
    def heads(self) -> int:
        return int(self.S.shape[2])

    @property
    def states(self) -> int:
        return int(self.S.shape[3])

    @property
    def rank(self) -> int:
        return int(self.S.shape[4])

    @property
    def memory_kind(self) -> str:
        """The kind of memory, as a sidecar names it."""
        return RWKV_MS if self.semantics else DELTA_RULE

    @property
    def fingerprint(self) -> str:
        return Identity(self.sidecar_sha256, self.base_sha256).fingerprint

    @property
    def made_by_tool(self) -> bool:
        return bool(self.flags & MADE_BY_TOOL)

    @property
    def current_chunk(self) -> np.ndarray:
        """The chunk that the next token belongs to, counted from 0: int64 [cells, layers]."""
        return np.asarray(self.tokens_written // self.chunk)

    @property
    def current_state(self) -> np.ndarray:
        """The state of each head that the next token is written to, int64 [cells, layers]."""
        return np.asarray(self.current_chunk % self.states)


class Identity(NamedTuple):
    """What a state belongs to: SHA-256 of the sidecar file and of the base GGUF, in hex."""

    sidecar_sha256: str
    base_sha256: str

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(bytes.fromhex(self.sidecar_sha256) + bytes.fromhex(self.base_sha256)).hexdigest()


def identity_of(sidecar: Sidecar) -> Identity:
    """The identity of the states that a model with this sidecar makes. Hashes the sidecar file."""
    return Identity(file_sha256(sidecar.path), sidecar.base_sha256)


def read_state(
    path: str | Path,
    *,
    sidecar: Sidecar | None = None,
    identity: Identity | None = None,
    kinds: Collection[int] = (SEQUENCE, CONTEXT, MEMORY),
    progress: Callable[[int], None] | None = None,
) -> State:
    """Reads and checks a state file; `progress` gets the bytes of each piece that was hashed.

    With a `sidecar`, identity and shape must be its own; an `identity` alone is checked without a sidecar at hand.
    Raises LlamamemError with the first reason of docs/state-format.md.
    """
    path = Path(path)
    if sidecar is not None and identity is None:
        identity = identity_of(sidecar)
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            raw = read_raw(
                file,
                size,
                progress,
                lambda magic, header, n_tokens: _check_header(magic, header, n_tokens, sidecar, identity, kinds),
            )
        state = _check(raw, sidecar, identity, kinds)
    except (NotRegular, IsADirectoryError):
        raise _of_file(path, refused("state-unreadable", "is not a file")) from None
    except OSError as e:
        raise _of_file(path, refused("state-unreadable", f"cannot be read ({e.strerror})")) from None
    except LlamamemError as e:
        raise _of_file(path, e) from None
    return replace(state, path=path)


def decode_state(data: bytes, *, identity: Identity | None = None) -> State:
    """The same checks of the bytes of a file of kind 4, a memory alone, that came some other way."""
    try:
        return _check(read_raw(io.BytesIO(data), len(data)), None, identity, (MEMORY,))
    except LlamamemError as e:
        raise LlamamemError(f"[{e.reason}] {e}", reason=e.reason) from None


def origin_sha256(data: bytes) -> str | None:
    """What a server calls the memory of such a file, of which a text begins: the hash of its values alone.

    None for the empty memory. `data` is that of a file that was checked.
    """
    values = data[_VALUES : -TRAILER.size]
    return hashlib.sha256(values).hexdigest() if any(values) else None


def write_state(path: str | Path, state: State) -> State:
    """Writes the memory of one sequence as a file of its own, beside `path` and renamed; returns it as read again.

    The same state gives the same bytes. What `read_state` would refuse is refused here, and nothing is written.
    """
    path = Path(path)
    try:
        data = encode_state(state)
        written = _check(read_raw(io.BytesIO(data), len(data)), None, None, (MEMORY,))
    except LlamamemError as e:
        raise _of_file(path, e) from None
    with replacing(path, mode=0o600) as part:  # what somebody said may be read out of a memory
        part.write_bytes(data)
    return replace(written, path=path)


def encode_state(state: State) -> bytes:
    """The bytes of a file of kind 4: the memory alone, without the tokens and the KV cache that it may come with."""
    if state.cells != 1:
        raise refused("state-kind", f"holds {state.cells} sequences, a memory alone is that of one")
    layers = state.layers
    laps, rest = np.divmod(state.tokens_written[0], state.states * state.chunk)
    matrices = state.S[0].swapaxes(-1, -2).reshape(layers, -1)
    cells = np.concatenate([matrices, state.prev[0], np.stack([rest, laps], axis=-1)], axis=1).astype("<f4")
    provenance = state.provenance.encode()
    if len(provenance) > 128:
        raise refused("state-shape", f"the provenance has {len(provenance)} bytes, at most 128 fit")
    header = Header(
        kind=MEMORY,
        layers=layers,
        heads=state.heads,
        states=state.states,
        rank=state.rank,
        chunk=state.chunk,
        semantics=state.semantics,
        cells=1,
        values=cells.shape[1],
        fingerprint=bytes.fromhex(state.fingerprint),
        flags=state.flags & MADE_BY_TOOL,
        sidecar=bytes.fromhex(state.sidecar_sha256),
        base=bytes.fromhex(state.base_sha256),
        provenance=provenance,
    )
    block = bytearray(header.pack() + cells.tobytes())
    block[CHECKSUM] = hashlib.sha256(block).digest()
    body = struct.pack("<3I", GGSQ, LLAMA_VERSION[GGSQ], 0) + block
    return body + TRAILER.pack(b"RMVE", VERSION, len(body), hashlib.sha256(body).digest())


def _of_file(path: Path, fault: LlamamemError) -> LlamamemError:
    """A refusal, with the file and its reason before it."""
    if fault.reason is None:
        return fault
    return LlamamemError(f"{path}: [{fault.reason}] {fault}", reason=fault.reason)


def _check(raw: RawState, sidecar: Sidecar | None, identity: Identity | None, kinds: Collection[int]) -> State:
    """What the bytes mean: from `state-identity` on."""
    _check_header(raw.magic, raw.header, len(raw.token_ids) // 4, sidecar, identity, kinds)
    return _state(raw)


def _check_header(
    magic: int,
    header: Header,
    n_tokens: int,
    sidecar: Sidecar | None,
    identity: Identity | None,
    kinds: Collection[int],
) -> None:
    found = Identity(header.sidecar.hex(), header.base.hex())
    if header.fingerprint.hex() != found.fingerprint:
        raise refused("state-identity", "its fingerprint is not that of the sidecar and base that it names")
    if identity is not None and found != identity:
        kind, text = RWKV_MS if header.semantics else DELTA_RULE, ""
        if sidecar is not None and sidecar.kind != kind:
            text = f"is a memory of kind {kind}, the sidecar is {sidecar.kind}: "
        raise refused(
            "state-identity",
            f"{text}belongs to sidecar {found.sidecar_sha256} and base {found.base_sha256}, "
            f"this is sidecar {identity.sidecar_sha256} and base {identity.base_sha256}",
        )
    if header.kind not in ((CONTEXT,) if magic == GGSN else (SEQUENCE, MEMORY)):
        raise refused("state-kind", f"says kind {header.kind}, which does not stand in such a file")
    if header.kind not in kinds:
        wanted = " or ".join(f"'{KINDS[kind]}'" for kind in kinds)
        raise refused("state-kind", f"is of kind '{KINDS[header.kind]}', must be {wanted}")
    _check_shape(header, n_tokens, sidecar)


def _check_shape(header: Header, n_tokens: int, sidecar: Sidecar | None) -> None:
    for name, most in _LIMITS.items():
        if not 1 <= getattr(header, name) <= most:
            raise refused("state-shape", f"{name} is {getattr(header, name)}, must be from 1 to {most}")
    if header.semantics > 2:
        raise refused("state-shape", f"semantics is {header.semantics}, must be 1 or 2, or 0 of a delta rule")
    if not header.semantics and (header.states, header.chunk) != (1, DELTA_CHUNK):
        odd = f"states is {header.states} and chunk {header.chunk}, of a delta rule they are 1 and {DELTA_CHUNK}"
        raise refused("state-shape", odd)
    if header.period > _MAX_PERIOD:
        raise refused("state-shape", f"chunk * states is {header.period}, must be at most {_MAX_PERIOD}")
    if header.matrices > _MAX_STATE:
        raise refused("state-shape", f"the matrices of a layer have {header.matrices} values, at most {_MAX_STATE}")
    if header.values != (values := header.matrices + header.prev + 2):
        raise refused("state-shape", f"values is {header.values}, must be {values} with these heads, states and rank")
    if header.cells < 1 or (header.cells > 1 and header.kind != CONTEXT):
        raise refused("state-shape", f"cells is {header.cells}, impossible for kind '{KINDS[header.kind]}'")
    if header.kind == MEMORY and (n_tokens or header.kv_bytes):
        raise refused("state-shape", "is a memory alone, and yet has token ids or a KV cache")
    if header.flags & ~_FLAGS[header.kind] or any(header.reserved):
        raise refused("state-shape", f"flags is {header.flags:#x}, impossible for kind '{KINDS[header.kind]}'")
    if header.flags & SETTING:
        scale, frozen, _ = _SETTING.unpack_from(header.provenance)
        known = np.isfinite(scale) and frozen <= 1 and not any(header.provenance[_SETTING.size :])
        if not known or header.flags & MADE_BY_TOOL:
            raise refused("state-shape", "has a setting that cannot be one")
    else:
        text, _, rest = header.provenance.partition(b"\0")
        if any(rest) or not _is_utf8(text) or (text and not header.flags & MADE_BY_TOOL):
            raise refused("state-shape", f"has a provenance where none may be: {quoted(text.decode(errors='replace'))}")
    if sidecar is not None:
        for name in (*_LIMITS, "semantics"):
            want = len(sidecar.layers) if name == "layers" else getattr(sidecar, name)
            if getattr(header, name) != want:
                raise refused("state-shape", f"{name} is {getattr(header, name)}, the sidecar has {want}")


def _state(raw: RawState) -> State:
    header = raw.header
    cells = np.frombuffer(raw.cells, "<f4").astype(np.float32).reshape(-1, header.layers, header.values)
    if len(bad := np.argwhere(~np.isfinite(cells))):
        cell, layer, value = bad[0]
        raise refused("state-values", f"cell {cell}, target layer {layer}: value {value} is not finite")
    matrices, prev, counters = np.split(cells, [header.matrices, header.values - 2], axis=-1)
    low, laps = counters[..., 0], counters[..., 1]
    good = (low >= 0) & (low < header.period) & (low % 1 == 0) & (laps >= 0) & (laps <= _MAX_LAPS) & (laps % 1 == 0)
    if len(bad := np.argwhere(~good)):
        cell, layer = bad[0]
        raise refused("state-values", f"cell {cell}, target layer {layer}: the token counter is out of range")
    n, shape = header.cells, (header.layers, header.heads, header.states, header.rank, header.rank)
    tokens_written = low.astype(np.int64) + laps.astype(np.int64) * header.period
    return State(
        S=np.ascontiguousarray(matrices[:n].reshape(n, *shape).swapaxes(-1, -2)),
        prev=np.ascontiguousarray(prev[:n]),
        tokens_written=tokens_written[:n],
        chunk=header.chunk,
        semantics=header.semantics,
        sidecar_sha256=header.sidecar.hex(),
        base_sha256=header.base.hex(),
        kind=header.kind,
        flags=header.flags,
        provenance="" if header.flags & SETTING else header.provenance.rstrip(b"\0").decode(),
        setting=_setting(header),
        token_ids=_text(np.frombuffer(raw.token_ids, "<i4").astype(np.int32)),
        architecture=raw.architecture,
        kv_bytes=header.kv_bytes,
        origin_tokens=tokens_written[n:] if header.flags & ORIGINS else None,
        size=raw.size,
        sha256=raw.sha256,
    )


def _setting(header: Header) -> Setting | None:
    if not header.flags & SETTING:
        return None
    scale, frozen, lora = _SETTING.unpack_from(header.provenance)
    return Setting(scale, bool(frozen), lora)


def _text(ids: np.ndarray) -> np.ndarray:
    """The tokens alone: llama-server packs those of a slot as -1, 1, their number, the tokens, and its images."""
    if len(ids) < 4 or tuple(ids[:2]) != (-1, 1) or not 0 <= ids[2] <= len(ids) - 4:
        return ids
    return ids[3 : 3 + ids[2]]


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True
