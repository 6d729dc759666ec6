"""The memory alone: kept when the KV cache is dropped, frozen, scaled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from native_runs import logits, logits_after_kv_dropped, logits_at_scale, logits_frozen

from llamamem.formats.sidecar.export import export_sidecar

pytestmark = pytest.mark.native

EXACT = 5e-5  # as in test_model_parity.py
PRODUCT = 8e-3


@pytest.mark.parametrize("n_ubatch", [1, 7, 512])
def test_a_second_conversation_on_the_memory_of_the_first(
    exact: Any,
    base: Path,
    sidecars: dict[str, Path],
    reference: dict[str, np.ndarray],
    tmp_path: Path,
    n_ubatch: int,
) -> None:
    expected = reference["p1_mem_v1_after_p0_kvdrop"]
    got, states = exact(
        logits_after_kv_dropped,
        base,
        sidecars["v1"],
        reference["p0_ids"],
        reference["p1_ids"],
        tmp_path / "memory",
        n_ubatch=n_ubatch,
    )
    assert np.abs(got - expected).max() <= EXACT
    np.testing.assert_array_equal(got.argmax(1), expected.argmax(1))
    assert states[0].n == len(reference["p0_ids"]) + len(reference["p1_ids"])
    # or the file might as well have been empty
    assert np.abs(expected - reference["p1_mem_v1"]).max() > 1000 * EXACT


def test_scale_0_is_the_base(
    product: Any, base: Path, sidecars: dict[str, Path], reference: dict[str, np.ndarray]
) -> None:
    ids = reference["p1_ids"]
    np.testing.assert_array_equal(
        product(logits_at_scale, base, sidecars["v1"], ids, scale=0.0), product(logits, base, None, ids)
    )


def test_half_the_scale_is_half_of_alpha(
    product: Any, base: Path, sidecars: dict[str, Path], reference: dict[str, np.ndarray], tmp_path: Path
) -> None:
    """alpha multiplies the same deltas: a power of two changes no other bit."""
    data = base.parent
    config = json.loads((data / "delta_mem_config.json").read_text())
    for name in ("delta_mem_adapter.pt", "adapter_metadata.json"):
        (tmp_path / name).write_bytes((data / name).read_bytes())
    (tmp_path / "delta_mem_config.json").write_text(json.dumps(config | {"alpha": config["alpha"] / 2}))
    half = tmp_path / "half.gguf"
    export_sidecar(tmp_path, base, half)
    ids = reference["p0_ids"]
    got = product(logits_at_scale, base, sidecars["v1"], ids, scale=0.5)
    np.testing.assert_array_equal(got, product(logits, base, half, ids))
    assert np.abs(got - product(logits, base, sidecars["v1"], ids)).max() > PRODUCT


def test_a_frozen_memory_that_is_empty_is_the_base(
    product: Any, base: Path, sidecars: dict[str, Path], reference: dict[str, np.ndarray]
) -> None:
    """Nothing is written, so there is never anything to read."""
    ids = reference["p0_ids"]
    np.testing.assert_array_equal(
        product(logits_at_scale, base, sidecars["v1"], ids, frozen=True), product(logits, base, None, ids)
    )


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_frozen_memory_is_read_and_never_written(
    product: Any, base: Path, sidecars: dict[str, Path], reference: dict[str, np.ndarray], version: str
) -> None:
    """As if every token found the memory that the first conversation left."""
    prompts = reference["p0_ids"], reference["p1_ids"]
    got, before, after = product(logits_frozen, base, sidecars[version], *prompts, put_back=False)
    expected, _, _ = product(logits_frozen, base, sidecars[version], *prompts, put_back=True)
    np.testing.assert_array_equal(got, expected)
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one.S, other.S)
        np.testing.assert_array_equal(one.prev, other.prev)
        assert one.n == other.n == len(prompts[0])
