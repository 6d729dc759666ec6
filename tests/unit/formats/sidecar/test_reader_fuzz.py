"""Whatever a file holds: the reader answers with known reasons in one line each, and never with another exception.

LLAMAMEM_FUZZ_SECONDS=N goes on for about so long; an input that breaks it is printed by Hypothesis.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llamamem.errors import LlamamemError
from llamamem.formats.findings import REASONS
from llamamem.formats.sidecar import read_sidecar, validate_sidecar

HOSTILE = Path(__file__).parents[3] / "data" / "hostile"
SEEDS = sorted(HOSTILE.glob("*.gguf"))[::7]
SECONDS = float(os.environ.get("LLAMAMEM_FUZZ_SECONDS", "3"))

# where, how many bytes go, what comes in their place
EDITS = st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 40), st.binary(max_size=40)), min_size=1, max_size=6)


def edited(data: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    for at, n, new in edits:
        at %= len(data) + 1
        data = data[:at] + new + data[at + n :]
    return data


def test_any_file_gets_a_clear_answer(tmp_path: Path) -> None:
    path, deadline, count = tmp_path / "any.gguf", time.monotonic() + SECONDS, 0

    @settings(deadline=None, max_examples=200, database=None, suppress_health_check=list(HealthCheck))
    @given(seed=st.sampled_from(SEEDS), edits=EDITS)
    def check(seed: Path, edits: list[tuple[int, int, bytes]]) -> None:
        nonlocal count
        count += 1
        path.write_bytes(edited(seed.read_bytes(), edits))
        validation = validate_sidecar(path)
        for finding in validation.findings:
            assert finding.reason in REASONS and "\n" not in finding.message
        if validation.findings:
            with pytest.raises(LlamamemError) as caught:
                read_sidecar(path)
            assert caught.value.reason == validation.findings[0].reason and str(path) in str(caught.value)
        else:
            read_sidecar(path)

    while time.monotonic() < deadline:
        check()
    print(f"{count} files")
