"""The memory as shipped on the lab's data: RWKV-MS with its chunks and its own reader, rank by rank.

The scan, with its boundaries, and the read, with its routing over states, are the oracle's own. What is given here
instead of learnt are the features: a needle's key and value as drawn, and gates that are the same for every needle and
for every filler token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from math import isinf
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from llamamem.lab.dla_data import Draws, needles
from llamamem.lab.dla_states import cosine
from llamamem.lab.intervals import interval
from llamamem.lab.tables import Table
from llamamem.reference.oracle import F32, FEATURES, LIVE, MemoryShape, read_states, scan

DECAY = 0.996  # of a token, where training starts

# write gates of a needle and of a filler token: those of a model that knows a needle, and where training starts
GATES = {"sharp": (0.95, 0.05), "start": (0.0474, 0.0474)}

Trial = dict[str, Any]


class Rule(NamedTuple):
    """An update of the state, by what it keeps of a gate and what decays."""

    semantics: int
    keep: Callable[[np.ndarray], np.ndarray]
    decay: float


RULES = {
    "semantics 1": Rule(1, lambda beta: 1 - beta, DECAY),  # of what was there, a row keeps what it does not write
    "semantics 2": Rule(2, np.ones_like, DECAY),
    "delta rule": Rule(1, np.ones_like, 1.0),  # erases what its key finds, and nothing else
}


@dataclass(frozen=True)
class Plan:
    """What is measured: each rule at each rank, number of states and chunk."""

    ranks: tuple[int, ...] = (8, 16)
    states: tuple[int, ...] = (1, 2, 4, 8)
    chunks: tuple[int, ...] = (16, 32, 1024)  # tokens
    needles: int = 8
    fill: int = 12  # tokens of filler after each, about
    gates: str = "sharp"
    seeds: int = 10


def trials(plan: Plan) -> Iterator[Trial]:
    """Recall of every needle after the last token, in order of the plan."""
    for rank, states, chunk in product(plan.ranks, plan.states, plan.chunks):
        for name, seed in product(RULES, range(plan.seeds)):
            yield {
                "metric": "memory",
                "rank": rank,
                "states": states,
                "chunk": chunk,
                "rule": name,
                "floats": states * rank * rank,
                "seed": seed,
                **measure(plan, MemoryShape(rank=rank, states=states, chunk=chunk), name, seed),
            }


def measure(plan: Plan, shape: MemoryShape, name: str, seed: int) -> Trial:
    """Of one sequence: T, states written to, and of its needles the cosines and the share that is told apart.

    `own` is the read that ships, over all states by its own routing; `told` reads the state that was written to at the
    needle's position. A needle is told apart when what is read is nearer to its value than to any other needle's.
    """
    rule = RULES[name]
    shape = MemoryShape(rank=shape.rank, states=shape.states, chunk=shape.chunk, semantics=rule.semantics)
    keys, values, places = needles(Draws(900 + seed), plan.needles, plan.fill, shape.rank)
    S = scan(features(keys, values, places, plan.gates, rule), _empty(shape), 0, shape, np.full(len(keys), LIVE))
    final, wanted = S["final_S"], values[places]
    wanted = wanted / np.linalg.norm(wanted, axis=1, keepdims=True)
    found: dict[str, list[float]] = {what: [] for what in ("own", "own_right", "told", "told_right", "route")}
    for i, t in enumerate(places):
        key = keys[t].astype(F32)
        own, routes = read_states(final, key[None], shape)
        mine = (t // shape.chunk) % shape.states
        for how, answer in (("own", own[0]), ("told", final[0, mine] @ key)):
            found[how].append(cosine(answer, wanted[i]))
            found[f"{how}_right"].append(float(np.argmax(wanted @ answer) == i))
        found["route"].append(float(routes[0, mine]))
    written = min(shape.states, -(-len(keys) // shape.chunk))
    return {"T": len(keys), "written": written, **{what: float(np.mean(figures)) for what, figures in found.items()}}


def features(keys: np.ndarray, values: np.ndarray, places: list[int], gates: str, rule: Rule) -> dict[str, np.ndarray]:
    """What the oracle's scan wants of each token, [T, R] each."""
    of_needle, of_filler = GATES[gates]
    beta = np.full_like(keys, of_filler)
    beta[places] = of_needle
    one = np.ones_like(keys)
    kh = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    made = {"r": keys, "decay": rule.decay * one, "k": kh, "v": values, "a": -kh, "b": kh}
    made |= {"keep": rule.keep(beta), "erase": beta, "write": beta}
    return {name: made[name].astype(F32) for name in FEATURES}


def rows(lines: Iterable[Trial]) -> list[tuple[Trial, dict[str, list[Trial]]]]:
    """By rank, states and chunk, what they are and the trials of each rule."""
    groups: dict[tuple[int, ...], tuple[Trial, dict[str, list[Trial]]]] = {}
    for line in lines:
        key = (line["rank"], line["states"], line["chunk"])
        about = {name: line[name] for name in ("rank", "states", "chunk", "floats", "written")}
        groups.setdefault(key, (about, {}))[1].setdefault(line["rule"], []).append(line)
    return list(groups.values())


def table(plan: Plan, lines: list[Trial]) -> Table:
    made = []
    for about, by_rule in rows(lines):
        cells = [str(value) for value in about.values()]
        for trials_ in by_rule.values():
            mean, half = interval([trial["own"] for trial in trials_])
            told = fmean(trial["told"] for trial in trials_)
            cells += [f"{mean:.2f}" + ("" if isinf(half) else f" ± {half:.2f}"), f"{told:.2f}"]
        made.append((*cells, f"{fmean(trial['route'] for trial in by_rule['semantics 1']):.2f}"))
    head = [f"{name}{how}" for name in RULES for how in ("", ", told")]
    longest = max(line["T"] for line in lines)
    about_it = (
        f"Recall (cosine) of {plan.needles} needles in up to {longest} tokens, {plan.gates} gates, "
        f"{plan.seeds} seeds, with 95 % intervals. First by the memory's own read, then by a reader that is told in "
        "which state a needle is. floats: of the states; written: states that were written to at all; route: the "
        "weight that the memory's own read (semantics 1) gives the state that holds the needle."
    )
    return Table(
        "The memory as shipped", ("rank", "states", "chunk", "floats", "written", *head, "route"), tuple(made), about_it
    )


def _empty(shape: MemoryShape) -> np.ndarray:
    return np.zeros((1, shape.states, shape.rank, shape.rank), F32)
