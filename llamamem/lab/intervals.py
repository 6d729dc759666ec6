"""95 % intervals of paired differences over a handful of seeds: Student's t."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev

# two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom
_T = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
    2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
    2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423,
)  # fmt: skip
_Z = 1.959964


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and how far the 95 % interval reaches to either side of it; endless for a single value."""
    if len(values) < 2:
        return fmean(values), math.inf
    return fmean(values), quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))


def quantile(freedom: int) -> float:
    """Of Student's t, two-sided 95 %."""
    if freedom <= len(_T):
        return _T[freedom - 1]
    return _Z + (_Z**3 + _Z) / (4 * freedom) + (5 * _Z**5 + 16 * _Z**3 + 3 * _Z) / (96 * freedom**2)


def shown(values: Sequence[float], digits: int = 3) -> str:
    """`+0.013 ± 0.004`."""
    mean, half = interval(values)
    return f"{mean:+.{digits}f} ± " + ("?" if math.isinf(half) else f"{half:.{digits}f}")
