"""State files: what is read, what is written, and every reason for which one is refused."""

from __future__ import annotations

import math
import re
import struct
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import state_files as files
from hypothesis import given, settings
from hypothesis import strategies as st
from state_document import header_fields, read_by_document, tables
from state_files import CONTEXT, MEMORY, SEQUENCE, C, M, N, R, StateFile, seal, u32

from llamamem.errors import LlamamemError
from llamamem.formats.sidecar import read_sidecar
from llamamem.formats.state import STATE_REASONS, Identity, Setting, State, identity_of, read_state, write_state

KINDS = {"memory": MEMORY, "sequence": SEQUENCE, "context": CONTEXT}
IDENTITY = Identity(files.SIDECAR, files.BASE)


@pytest.fixture
def put(tmp_path: Path) -> Callable[[StateFile | bytes], Path]:
    def write(file: StateFile | bytes) -> Path:
        path = tmp_path / "x.state"
        path.write_bytes(file.bytes() if isinstance(file, StateFile) else file)
        return path

    return write


def refusal(path: Path, **expected: object) -> tuple[str, str]:
    """Reason and text of a refusal, whose form is checked."""
    with pytest.raises(LlamamemError) as caught:
        read_state(path, **expected)  # type: ignore[arg-type]
    match = re.fullmatch(rf"{re.escape(str(path))}: \[(state-[a-z-]+)\] (.+)", str(caught.value))
    assert match and match[1] == caught.value.reason and match[1] in STATE_REASONS
    assert caught.value.exit_status == 2
    return match[1], match[2]


# -- what is read


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_is_what_stands_in_the_file_by_the_document(kind: str, put) -> None:
    file = KINDS[kind]
    state, said = read_state(put(file)), read_by_document(file.bytes())
    assert (state.kind, state.cells, state.layers) == (said["kind"], said["cells"], said["target layers"])
    assert (state.heads, state.states, state.rank, state.chunk) == (said["N"], said["M"], said["R"], said["C"])
    assert (state.semantics, state.flags) == (said["semantics"], said["flags"])
    assert bytes.fromhex(state.fingerprint) == said["fingerprint"]
    assert bytes.fromhex(state.sidecar_sha256) == said["hash of the sidecar file"]
    assert bytes.fromhex(state.base_sha256) == said["hash of the base GGUF"]
    assert state.provenance.encode() == said["provenance"].rstrip(b"\0")
    assert tuple(state.token_ids) == said["token ids"] == file.token_ids
    assert state.kv_bytes == said["bytes of the KV cache after the block"] == len(file.kv)
    assert state.architecture == said.get("architecture", "")
    for cell in range(state.cells):
        for layer in range(state.layers):
            found = said["layers"][cell * state.layers + layer]
            assert {index: state.S[(cell, layer, *index)] for index in found["S"]} == found["S"]
            assert tuple(state.prev[cell, layer]) == found["prev"]
            assert state.tokens_written[cell, layer] == found["tokens"]
    if file.origins:
        assert state.origin_tokens is not None
        assert [row["tokens"] for row in said["layers"][state.cells * state.layers :]] == list(state.origin_tokens[0])


def test_the_document_names_the_reasons_and_their_order() -> None:
    reasons = [row[0].strip("`") for row in tables()["reason | when"]]
    assert reasons == list(STATE_REASONS)


def test_the_reasons_are_those_of_the_runtime() -> None:
    sources = (Path(__file__).parents[4] / "patches/src").glob("llama-adapter-mem*.cpp")
    codes = {code for p in sources for code in re.findall(r'"(state-[a-z-]+)"', p.read_text(encoding="utf-8"))}
    assert codes == STATE_REASONS.keys()


def test_the_header_of_the_document_has_no_gaps() -> None:
    at = 0
    for offset, size, _ in header_fields():
        assert offset == at
        at += int(size) if size.isdigit() else 0
    assert at == 320


def test_a_setting_that_is_not_the_default_is_read(put) -> None:
    assert read_state(put(SEQUENCE)).setting is None
    state = read_state(put(replace(SEQUENCE, header={120: u32(4 | 2), 192: struct.pack("<fIQ", 0.5, 1, 7)})))
    assert state.setting == Setting(0.5, True, 7) and state.provenance == ""


def test_counters_say_what_is_written_to_next(put) -> None:
    state = read_state(put(CONTEXT))
    assert state.tokens_written.tolist() == [[3, 3], [4 + M * C, 4 + M * C], [5 + 2 * M * C] * 2]
    assert state.current_chunk.tolist() == [[0, 0], [3, 3], [7, 7]]
    assert state.current_state.tolist() == [[0, 0], [0, 0], [1, 1]]


@pytest.mark.parametrize(
    ("in_the_file", "text"),
    [
        ((-1, 1, 3, 2, 105, 7, 0), (2, 105, 7)),  # as llama-server writes them
        ((-1, 1, 0, 0), ()),
        ((-1, 1, 4, 2, 105, 7, 0), (-1, 1, 4, 2, 105, 7, 0)),
        ((-1, 1, -1, 0), (-1, 1, -1, 0)),
        ((2, 1, 1, 9, 0), (2, 1, 1, 9, 0)),
    ],
)
def test_the_token_ids_of_a_server_slot(in_the_file: tuple[int, ...], text: tuple[int, ...], put) -> None:
    assert tuple(read_state(put(replace(SEQUENCE, token_ids=in_the_file))).token_ids) == text


def test_a_large_kv_cache_is_hashed_in_pieces(put) -> None:
    path = put(replace(SEQUENCE, kv=bytes(24 << 20)))
    pieces: list[int] = []
    tracemalloc.start()
    state = read_state(path, progress=pieces.append)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert state.kv_bytes == 24 << 20 and len(pieces) > 10
    assert peak < 8 << 20


# -- what is written


def test_a_state_is_written_as_it_was_read(put, tmp_path: Path) -> None:
    first = put(MEMORY).read_bytes()
    written = write_state(tmp_path / "y.state", read_state(put(MEMORY)))
    assert (tmp_path / "y.state").read_bytes() == first
    assert written.size == len(first) and written.path == tmp_path / "y.state"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.state", "y.state"]


def test_of_a_sequence_its_memory_alone_is_written(put, tmp_path: Path) -> None:
    sequence = read_state(put(SEQUENCE))
    memory = write_state(tmp_path / "y.state", sequence)
    assert (memory.kind, memory.kv_bytes, memory.token_ids.size, memory.flags) == (4, 0, 0, 0)
    assert memory.origin_tokens is None
    for name in ("S", "prev", "tokens_written"):
        assert np.array_equal(getattr(memory, name), getattr(sequence, name))


def test_states_of_the_reference_run_survive(model_a: Path, tmp_path: Path) -> None:
    sidecar = read_sidecar(model_a / "sidecar-v1.gguf")
    identity = identity_of(sidecar)
    recorded = np.load(model_a / "logits.npz")
    shape = (1, len(sidecar.layers), sidecar.heads, sidecar.states, sidecar.rank, sidecar.rank)
    state = State(
        S=recorded["p0_v1_S"].reshape(shape),
        prev=recorded["p0_v1_prev"][None],
        tokens_written=recorded["p0_v1_pos"][None],
        chunk=sidecar.chunk,
        semantics=sidecar.semantics,
        sidecar_sha256=identity.sidecar_sha256,
        base_sha256=identity.base_sha256,
    )
    write_state(tmp_path / "p0.state", state)
    read = read_state(tmp_path / "p0.state", sidecar=sidecar)
    assert np.array_equal(read.S, state.S) and np.array_equal(read.prev, state.prev)
    assert (read.tokens_written == 165).all()
    by_document = read_by_document((tmp_path / "p0.state").read_bytes())["layers"][4]["S"]
    assert by_document[0, 2, 1, 7] == recorded["p0_v1_S"].reshape(shape)[0, 4, 0, 2, 1, 7]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: {"S": s.S * np.float32(np.nan)}, "state-values"),
        (lambda s: {"S": np.full(s.S.shape, 1e300)}, "state-values"),
        (lambda s: {"tokens_written": s.tokens_written - 100}, "state-values"),
        (lambda s: {"tokens_written": s.tokens_written + (M * C << 25)}, "state-values"),
        (lambda s: {"provenance": "é" * 65, "flags": 1}, "state-shape"),
        (lambda s: {"provenance": "made"}, "state-shape"),
        (lambda s: {"semantics": 3}, "state-shape"),
    ],
)
def test_what_would_be_refused_is_not_written(change, reason: str, put, tmp_path: Path) -> None:
    state = read_state(put(MEMORY))
    with np.errstate(over="ignore"), pytest.raises(LlamamemError, match=rf"y\.state: \[{reason}\]"):
        write_state(tmp_path / "y.state", replace(state, **change(state)))
    assert [path.name for path in tmp_path.iterdir()] == ["x.state"]


def test_a_whole_context_is_not_written_as_a_memory(put, tmp_path: Path) -> None:
    with pytest.raises(LlamamemError, match=r"\[state-kind\] holds 3 sequences"):
        write_state(tmp_path / "y.state", read_state(put(CONTEXT)))


# -- what is refused


def test_no_file(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none")[0] == "state-unreadable"
    assert refusal(tmp_path) == ("state-unreadable", "is not a file")


STOCK = MEMORY.prefix + bytes(4) + b"\x10" * 200  # as llama.cpp writes it without a memory
REFUSED: list[tuple[str, StateFile | bytes, str]] = [
    # before the block; what a file ends within, has no other reason
    ("state-truncated", b"", "magic"),
    ("state-truncated", b"qsgg\3\0\0", "version"),
    ("state-format", b"GGUF" + bytes(400), "llama.cpp"),
    ("state-format", seal(b"qsgg" + u32(4) + MEMORY.bytes()[8:-48]), "version 4"),
    ("state-format", seal(b"nsgg" + u32(3) + CONTEXT.bytes()[8:-48]), "version 3"),
    ("state-truncated", b"qsgg" + u32(3, 0xFFFFFFFF) + MEMORY.bytes()[12:], "token ids"),
    ("state-no-memory", STOCK, "without a sidecar"),
    ("state-truncated", STOCK[:40], "trailer"),
    # the trailer
    ("state-truncated", MEMORY.bytes() + b"junk", "trailer"),
    ("state-truncated", MEMORY.bytes() * 2, "before its trailer"),
    ("state-version", MEMORY.bytes()[:-44] + u32(2) + MEMORY.bytes()[-40:], "trailer is of version 2"),
    ("state-checksum", MEMORY.bytes()[:-1] + b"\0", "damaged"),
    ("state-checksum", SEQUENCE.bytes()[:-100] + b"\0" + SEQUENCE.bytes()[-99:], "damaged"),
    # the block, in a file whose own hash is right
    ("state-truncated", seal(CONTEXT.prefix[:-10] + u32(0xFFFFFFFF) + b"gemma4" + CONTEXT.block()), "architecture"),
    ("state-no-memory", seal(STOCK), "without a sidecar"),
    ("state-no-memory", seal(MEMORY.prefix), "without a sidecar"),
    ("state-version", replace(MEMORY, header={4: u32(2)}), "version 2"),
    ("state-version", replace(MEMORY, header={8: u32(324)}), "header of 324 bytes"),
    ("state-version", seal(MEMORY.bytes()[:20]), "header of 0 bytes"),
    ("state-truncated", seal(MEMORY.bytes()[:300]), "header"),
    ("state-truncated", replace(MEMORY, header={16: u32(3)}), "its header says"),
    ("state-truncated", replace(MEMORY, header={16: u32(0xFFFFFFFF), 40: u32(0xFFFFFFFF)}), "its header says"),
    ("state-truncated", replace(MEMORY, header={48: b"\1"}), "1 of KV cache"),
    ("state-truncated", replace(SEQUENCE, header={120: u32(0)}), "its header says"),
    ("state-checksum", replace(MEMORY, header={88: bytes(32)}), "memory block"),
    # what the bytes mean
    ("state-identity", replace(MEMORY, header={56: bytes(32)}), "fingerprint"),
    ("state-identity", replace(MEMORY, header={128: bytes(32)}), "fingerprint"),
    ("state-identity", replace(MEMORY, header={160: bytes(32)}), "fingerprint"),
    ("state-kind", replace(MEMORY, header={12: u32(2)}), "kind 2"),
    ("state-kind", replace(MEMORY, header={12: u32(3)}), "kind 3"),
    ("state-kind", replace(MEMORY, header={12: u32(7)}), "kind 7"),
    ("state-kind", replace(CONTEXT, header={12: u32(1)}), "kind 1"),
    ("state-shape", replace(MEMORY, cells=0, header={16: u32(0)}), "layers is 0"),
    ("state-shape", replace(MEMORY, header={20: u32(0)}), "heads is 0"),
    ("state-shape", replace(MEMORY, header={20: u32(65)}), "heads is 65"),
    ("state-shape", replace(MEMORY, header={24: u32(1025)}), "states is 1025"),
    ("state-shape", replace(MEMORY, header={28: u32(257)}), "rank is 257"),
    ("state-shape", replace(MEMORY, header={32: u32(0)}), "chunk is 0"),
    ("state-shape", replace(MEMORY, header={32: u32(1 << 24)}), "chunk * states"),
    ("state-shape", replace(MEMORY, header={36: u32(3)}), "semantics is 3"),
    ("state-shape", replace(MEMORY, header={20: u32(64, 1024, 256)}), "matrices of a layer"),
    ("state-shape", replace(MEMORY, header={28: u32(R + 1)}), "values is 30, must be 62"),
    ("state-shape", replace(MEMORY, header={16: u32(1), 40: u32(2)}), "cells is 2"),
    ("state-shape", replace(CONTEXT, cells=0), "cells is 0"),
    ("state-shape", replace(MEMORY, token_ids=(1, 2)), "token ids"),
    ("state-shape", replace(MEMORY, kv=b"kv"), "KV cache"),
    ("state-shape", replace(MEMORY, origins=True), "flags is 0x2"),
    ("state-shape", replace(SEQUENCE, header={120: u32(8 | 2)}), "flags is 0xa"),
    ("state-shape", replace(MEMORY, header={120: u32(4)}), "flags is 0x4"),
    ("state-shape", replace(CONTEXT, header={120: u32(4)}), "flags is 0x4"),
    ("state-shape", replace(SEQUENCE, header={120: u32(4 | 2 | 1)}), "setting"),
    ("state-shape", replace(SEQUENCE, header={120: u32(4 | 2), 192: struct.pack("<fI", math.nan, 0)}), "setting"),
    ("state-shape", replace(SEQUENCE, header={120: u32(4 | 2), 192: struct.pack("<fI", 1.0, 2)}), "setting"),
    ("state-shape", replace(SEQUENCE, header={120: u32(4 | 2), 208: b"x"}), "setting"),
    ("state-shape", replace(MEMORY, header={124: b"\1"}), "flags"),
    ("state-shape", replace(MEMORY, header={192: b"text"}), "'text'"),
    ("state-shape", replace(MEMORY, header={120: u32(1), 192: b"a\0b"}), "provenance"),
    ("state-shape", replace(MEMORY, header={120: u32(1), 192: b"\xff"}), "provenance"),
    ("state-values", replace(MEMORY, values={3: np.nan}), "cell 0, target layer 0: value 3"),
    ("state-values", replace(CONTEXT, values={files.VALUES * 5 + 1: -np.inf}), "cell 2, target layer 1: value 1"),
    ("state-values", replace(SEQUENCE, values={files.VALUES * 3: np.inf}), "cell 1, target layer 1: value 0"),
    ("state-values", replace(MEMORY, values={files.VALUES - 2: -1}), "target layer 0: the token counter"),
    ("state-values", replace(MEMORY, values={files.VALUES - 2: 1.5}), "counter"),
    ("state-values", replace(MEMORY, values={files.VALUES - 2: M * C}), "counter"),
    ("state-values", replace(MEMORY, values={-1: -1}), "target layer 1: the token counter"),
    ("state-values", replace(MEMORY, values={-1: 0.5}), "counter"),
    ("state-values", replace(MEMORY, values={-1: 2.0**25}), "counter"),
]


@pytest.mark.parametrize(("reason", "file", "text"), REFUSED, ids=[f"{i}-{r}" for i, (r, _, _) in enumerate(REFUSED)])
def test_a_file_is_refused(reason: str, file: StateFile | bytes, text: str, put) -> None:
    found, said = refusal(put(file))
    assert (found, text in said) == (reason, True), said


def test_every_reason_of_a_file_has_a_case() -> None:
    in_the_runtime_alone = {"state-has-memory", "state-kv", "state-unwritable"}
    assert {reason for reason, _, _ in REFUSED} | {"state-unreadable"} == STATE_REASONS.keys() - in_the_runtime_alone


def test_the_first_reason_is_that_of_the_order(put) -> None:
    """Each file has the fault of the one before it too, and one that is looked for earlier."""
    file = replace(MEMORY, header={}, values={0: np.nan})
    other = Identity("00" * 32, files.BASE)
    assert refusal(put(file))[0] == "state-values"
    file.header[36] = u32(9)
    assert refusal(put(file))[0] == "state-shape"
    assert refusal(put(file), kinds=(1,))[0] == "state-kind"
    assert refusal(put(file), kinds=(1,), identity=other)[0] == "state-identity"
    file.header[88] = bytes(32)
    assert refusal(put(file), kinds=(1,), identity=other)[0] == "state-checksum"
    file.header[48] = b"\1"
    assert refusal(put(file), identity=other)[0] == "state-truncated"
    file.header[4] = u32(2)
    assert refusal(put(file), identity=other)[0] == "state-version"
    file.header[0] = b"SVMR"
    assert refusal(put(file), identity=other)[0] == "state-no-memory"
    data = file.bytes()[:-1]  # what surrounds the block comes before it
    assert refusal(put(data[:-1] + b"\0"))[0] in ("state-no-memory", "state-truncated")
    assert refusal(put(b"XXXX" + data[4:]))[0] == "state-format"


@pytest.mark.parametrize("kind", KINDS)
def test_every_flipped_byte_outside_of_the_values_is_refused_with_its_reason(kind: str, put) -> None:
    file, data = KINDS[kind], KINDS[kind].bytes()
    end = len(data) - 48
    cells = len(file.prefix) + 320
    for at in [*range(cells), *range(end, len(data))]:
        flipped = bytearray(data)
        flipped[at] ^= 0x80
        reason = refusal(put(bytes(flipped)))[0]
        if at < 8:
            assert reason == "state-format", at
        elif at < 12:  # the number of tokens: the block is looked for elsewhere, or beyond the end
            assert reason in ("state-truncated", "state-checksum"), at
        elif at < end:
            assert reason == "state-checksum", at
        else:
            trailer = (
                ["state-truncated"] * 4 + ["state-version"] * 4 + ["state-truncated"] * 8 + ["state-checksum"] * 32
            )
            assert reason == trailer[at - end], at


@pytest.mark.parametrize("kind", KINDS)
def test_random_flips_of_the_payload_are_refused(kind: str, put) -> None:
    data = KINDS[kind].bytes()
    random = np.random.default_rng(0)
    for at in random.integers(len(KINDS[kind].prefix) + 320, len(data) - 48, 150):
        flipped = bytearray(data)
        flipped[at] ^= 1 << int(random.integers(8))
        assert refusal(put(bytes(flipped)))[0] == "state-checksum"


@pytest.mark.parametrize("kind", KINDS)
def test_a_truncation_is_refused(kind: str, put) -> None:
    data = KINDS[kind].bytes()
    lengths = np.random.default_rng(0).choice(len(data), 200, replace=False)
    for length in {*range(16), *lengths.tolist(), *range(len(data) - 50, len(data))}:
        assert refusal(put(data[:length]))[0] == "state-truncated", length


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_nothing_but_a_refusal_comes_of_any_bytes(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Sealed again, so that more than the checksums is tried."""
    file = data.draw(st.sampled_from([MEMORY, SEQUENCE, CONTEXT]))
    edits = st.dictionaries(st.integers(0, 316), st.binary(min_size=1, max_size=4), max_size=3)
    body = replace(file, header=data.draw(edits)).bytes()[:-48]
    cut = body[: data.draw(st.integers(0, len(body)))] if data.draw(st.booleans()) else body
    path = tmp_path_factory.getbasetemp() / "any.state"
    path.write_bytes(seal(cut + data.draw(st.binary(max_size=8))) if data.draw(st.booleans()) else cut)
    try:
        read_state(path)
    except LlamamemError as e:
        assert e.reason in STATE_REASONS


# -- what is expected of one


def test_an_identity_that_is_expected(put) -> None:
    path = put(SEQUENCE)
    assert read_state(path, identity=IDENTITY).fingerprint == IDENTITY.fingerprint
    for other in (Identity("00" * 32, files.BASE), Identity(files.SIDECAR, "00" * 32)):
        reason, text = refusal(path, identity=other)
        assert reason == "state-identity"
        assert all(digest in text for digest in (*IDENTITY, *other))


def test_a_kind_that_is_expected(put) -> None:
    assert read_state(put(MEMORY), kinds=(4,)).kind == 4
    assert refusal(put(MEMORY), kinds=(1, 2)) == (
        "state-kind",
        "is of kind 'memory', must be 'sequence' or 'context'",
    )


def test_a_sidecar_that_is_expected(exported: Path, put) -> None:
    sidecar = read_sidecar(exported)
    path = put(MEMORY)
    assert refusal(path, sidecar=sidecar)[0] == "state-identity"
    same = replace(sidecar, heads=N, states=M, rank=R, chunk=C, semantics=2, layers=sidecar.layers[:2])
    assert read_state(path, sidecar=same, identity=IDENTITY).cells == 1
    for name in ("heads", "states", "rank", "chunk", "semantics"):
        other = replace(same, **{name: 1})
        reason, text = refusal(path, sidecar=other, identity=IDENTITY)
        assert reason == "state-shape" and f"{name} is {getattr(same, name)}, the sidecar has 1" in text
    reason, text = refusal(path, sidecar=replace(same, layers=sidecar.layers), identity=IDENTITY)
    assert reason == "state-shape" and "layers is 2, the sidecar has 6" in text
