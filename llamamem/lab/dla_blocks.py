"""Where a sequence is cut into blocks, each of which gets a state of its own.

A partition is the list of the blocks' first positions; it begins with 0. A boundary policy is one function of a Case;
what stands in POLICIES is measured and reported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from llamamem.lab.dla_data import Draws

TAU = 0.6  # a token that differs from its block by more than this begins a block of its own

Starts = list[int]


@dataclass(frozen=True)
class Case:
    """What a policy may look at: contributions [T, n], where needles are, the budget K, and draws after the data's."""

    contributions: np.ndarray
    needles: list[int]
    budget: int
    draws: Draws
    tau: float = TAU

    @property
    def length(self) -> int:
        return len(self.contributions)

    @cached_property
    def merged(self) -> tuple[Starts, np.ndarray]:
        """Algorithm 1: its blocks and each token's information."""
        return by_information(self.contributions, self.tau)

    @cached_property
    def dla(self) -> Starts:
        starts, information = self.merged
        return within_budget(starts, information, self.budget)


def by_information(u: np.ndarray, tau: float = TAU) -> tuple[Starts, np.ndarray]:
    """Algorithm 1: a token that says something new against the sum of its block begins the next one.

    The starts, and the State Information Score of each token.
    """
    starts, state, information = [0], u[0].copy(), np.zeros(len(u))
    for t in range(1, len(u)):
        information[t] = score(u[t], state)
        if information[t] >= tau:
            starts.append(t)
            state = u[t].copy()
        else:
            state = state + u[t]
    return starts, information


def score(token: np.ndarray, state: np.ndarray) -> float:
    """How far a token is from the state of its block, both of unit root mean square."""
    s, h = (x / np.sqrt((x * x).mean() + 1e-6) for x in (token, state))
    return float(np.linalg.norm(s - h) / (np.linalg.norm(h) + 1e-6))


def within_budget(starts: Starts, information: np.ndarray, budget: int) -> Starts:
    """Algorithm 2: while there are too many blocks, the two neighbours that hold the least information are one."""
    edges = [*starts, len(information)]
    while len(edges) - 1 > budget:
        densities = [density(information, *edges[i : i + 3]) for i in range(len(edges) - 2)]
        del edges[int(np.argmin(densities)) + 1]
    return edges[:-1]


def density(information: np.ndarray, start: int, middle: int, end: int) -> float:
    """Information a token of the blocks [start, middle) and [middle, end) together."""
    return float((information[start:middle].sum() + information[middle:end].sum()) / (end - start))


def equal(length: int, count: int) -> Starts:
    """About `count` blocks of the same length."""
    return sorted({int(edge) for edge in np.linspace(0, length, count + 1)} - {length})


def oracle(case: Case) -> Starts:
    """Each needle alone, and all between two of them together."""
    needles = set(case.needles)
    return [t for t in range(case.length) if t == 0 or t in needles or t - 1 in needles]


def dla(case: Case) -> Starts:
    return case.dla


def fixed(case: Case) -> Starts:
    """As many blocks as DLA has, of the same length."""
    return equal(case.length, len(case.dla))


def noisy_dla(case: Case) -> Starts:
    """DLA's blocks, each start moved by up to two tokens."""
    draws, length = case.draws.copy(), case.length
    moved = sorted(start + draws.randint(-2, 3) for start in case.dla[1:])
    starts = [0]
    for i, start in enumerate(moved):
        starts.append(max(starts[-1] + 1, min(length - (len(moved) - i), start)))
    return starts


def low_k_dla(case: Case) -> Starts:
    """DLA with half the budget."""
    starts, information = case.merged
    return within_budget(starts, information, max(1, case.budget // 2))


POLICIES: dict[str, Callable[[Case], Starts]] = {
    "oracle": oracle,
    "dla": dla,
    "fixed": fixed,
    "noisy_dla": noisy_dla,
    "low_k_dla": low_k_dla,
}


def block_of(starts: Starts, length: int) -> np.ndarray:
    """The number of the block of each position, [T]."""
    return np.searchsorted(starts, np.arange(length), side="right") - 1
