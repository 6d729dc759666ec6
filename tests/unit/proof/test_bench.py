"""How the bench takes turns and what its figures mean."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llamamem.proof.bench import Timing, _by_turns


def test_ratios() -> None:
    timing = Timing(100, base=[1.0, 2.0, 4.0], sidecar=[1.5, 2.2, 3.0], base_cpu=[1, 1, 1], sidecar_cpu=[1.1, 1, 2])
    assert timing.ratio_median == pytest.approx(1.1)
    assert timing.ratio_min == pytest.approx(1.5)
    assert timing.ratio_cpu == pytest.approx(1.1)
    assert timing.ratio_pairs == pytest.approx([1.5, 1.1, 0.75])
    assert timing.rate("base") == 50


@pytest.mark.parametrize("first", [0, 1])
def test_turns_alternate_and_both_see_every_token(first: int) -> None:
    calls: list[tuple[str, list[int], int]] = []

    def run(context: Any, ids: np.ndarray, pos: int) -> None:
        calls.append((context, ids.tolist(), pos))

    pair: list[Any] = ["base", "sidecar"]
    wall, cpu = _by_turns(pair, run, np.arange(5), 10, 2, first)
    order = ["base", "sidecar", "sidecar", "base", "base", "sidecar"]
    assert [name for name, _, _ in calls] == (order if first == 0 else [pair[1 - pair.index(name)] for name in order])
    for name in pair:
        assert [(ids, pos) for who, ids, pos in calls if who == name] == [([0, 1], 10), ([2, 3], 12), ([4], 14)]
    assert min(wall) > 0
    assert min(cpu) >= 0
