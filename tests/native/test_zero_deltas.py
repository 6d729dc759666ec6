"""A sidecar whose deltas are all zero gives the base's logits bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from native_runs import logits

pytestmark = pytest.mark.native

CACHES = {"f32": {"kv": "f32", "flash_attn": False}, "q8_0-fa": {"kv": "q8_0", "flash_attn": True}}


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("n_ubatch", [1, 512])
def test_zero_deltas_are_the_base(product: Any, small_zero: tuple[Path, Path], cache: str, n_ubatch: int) -> None:
    base, zero = small_zero
    ids = np.random.default_rng(1).integers(0, 1024, 200)
    options = {"n_ubatch": n_ubatch, **CACHES[cache]}
    with_zero = product(logits, base, zero, ids, **options)
    np.testing.assert_array_equal(with_zero, product(logits, base, None, ids, **options))
    assert np.isfinite(with_zero).all()
    assert with_zero.std() > 0.1  # not all the same


def test_the_same_sidecar_with_its_deltas_is_not(product: Any, small: tuple[Path, Path]) -> None:
    base, sidecar = small
    ids = np.random.default_rng(1).integers(0, 1024, 200)
    difference = np.abs(product(logits, base, sidecar, ids) - product(logits, base, None, ids)).max(axis=1)
    assert difference[0] == 0  # a zero state reads zero
    assert difference[1:].max() > 0.05
