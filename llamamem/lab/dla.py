"""The experiments of the DLA lab (DLA: arXiv 2606.10650): trials from seeds, and rows that are their means.

No training, NumPy alone. The names of the figures are those of the published files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llamamem.lab import dla_attention
from llamamem.lab.dla_blocks import POLICIES, TAU, Case, Starts, block_of, fixed
from llamamem.lab.dla_cache import CACHES, Memory
from llamamem.lab.dla_data import WIDTH, Draws, Sequence, Setting, needles, themes
from llamamem.lab.dla_states import UPDATES, recall

Trial = dict[str, Any]

BACKBONES = ("gdn", "rwkv7", "linear")


@dataclass(frozen=True)
class Plan:
    """What is measured; the defaults are the published experiments."""

    bound: tuple[Setting, ...] = (Setting(6, 24, 8), Setting(10, 16, 12), Setting(16, 12, 8), Setting(24, 10, 10))
    recall: tuple[Setting, ...] = (Setting(6, 8, 16), Setting(10, 6, 24), Setting(8, 10, 20))
    states: tuple[Setting, ...] = (Setting(8, 12, 16), Setting(12, 10, 16), Setting(16, 8, 12))
    caches: tuple[int, ...] = (8, 16)
    seeds: int = 5
    width: int = WIDTH
    tau: float = TAU


@dataclass(frozen=True)
class Results:
    """The trials of each experiment, in their order. `smoke` says whether log-linear attention is one thing."""

    plan: Plan
    smoke: bool
    smoke_differs: float
    bound: list[Trial]
    recall: list[Trial]
    states: list[Trial]
    caches: list[Trial] = field(default_factory=list)


def run(plan: Plan, *, hola: bool = False) -> Results:
    """All experiments; `hola` adds the one with caches."""
    smoke, differs = dla_attention.smoke()
    bounds, recalls, both = list(bound_trials(plan)), list(recall_trials(plan)), list(state_trials(plan))
    return Results(plan, smoke, differs, bounds, recalls, both, cache_trials(plan) if hola else [])


def bound(u: np.ndarray, starts: Starts) -> float:
    """The factor of theorem 3.1 that a partition of contributions [T, n] decides: lower is better."""
    block = block_of(starts, len(u))
    total = 0.0
    for i in range(len(starts)):
        part = u[block == i]
        total += np.sqrt(len(part)) * np.linalg.norm(part - part.mean(axis=0))
    return float(total)


def bound_trials(plan: Plan) -> Iterator[Trial]:
    for setting in plan.bound:
        for seed in range(plan.seeds):
            draws = Draws(seed)
            u = themes(draws, setting.segments, setting.length, plan.width)
            case = Case(u, [], setting.budget, draws, plan.tau)
            yield {
                "metric": "bound",
                "config": "K>=segments" if setting.budget >= setting.segments else "K<segments",
                "nseg": setting.segments,
                "K": setting.budget,
                "seed": seed,
                "T": len(u),
                "m_dla": len(case.dla),
                "bound_fixed": bound(u, fixed(case)),
                "bound_dla": bound(u, case.dla),
            }


def recall_trials(plan: Plan) -> Iterator[Trial]:
    for setting in plan.recall:
        for seed in range(plan.seeds):
            data, case = _case(plan, setting, 100 + seed)
            yield {
                **_about("recall", setting, seed, case.length),
                "m_dla": len(case.dla),
                "recall_fixed": recall(*data, fixed(case), UPDATES["linear"]),
                "recall_hrm_delta": recall(*data, [0], UPDATES["delta_rule"]),
                "recall_hrm_rwkv7": recall(*data, [0], UPDATES["rwkv7"]),
                "recall_hrm_rwkv7_multi": recall(*data, case.dla, UPDATES["rwkv7"]),
                "recall_dla": recall(*data, case.dla, UPDATES["linear"]),
            }


def state_trials(plan: Plan) -> Iterator[Trial]:
    for setting, policy, seed, data, case in _grid(plan):
        starts = POLICIES[policy](case)
        plain, better = (recall(*data, starts, UPDATES[state]) for state in ("linear", "rwkv7"))
        yield {
            **_about("state_only", setting, seed, case.length),
            "policy": policy,
            "states": len(starts),
            "recall_linear_state": plain,
            "recall_rwkv7_state": better,
            "rwkv_minus_linear": better - plain,
        }


def cache_trials(plan: Plan) -> list[Trial]:
    """Several states and a single one, with a cache beside them and without; and other updates of the states."""
    trials: list[Trial] = []
    singles: dict[tuple[Setting, int], Memory] = {}
    for setting, policy, seed, data, case in _grid(plan):
        starts = POLICIES[policy](case)
        memories = {name: Memory(*data, starts, UPDATES[name]) for name in BACKBONES}
        if (setting, seed) not in singles:  # whatever the policy, it is the same
            singles[setting, seed] = Memory(*data, [0], UPDATES["rwkv7"])
        several, single = memories["rwkv7"], singles[setting, seed]
        for width in plan.caches:
            trial = {**_about("hola", setting, seed, case.length), "policy": policy, "width": width}
            trial |= {"states": len(starts), "ms": several.recall()}
            for name, kind in (("ms+hola", "hola"), ("ms+hola-plain", "plain"), ("ms+recency", "recency")):
                trial[name] = several.recall(CACHES[kind](data[0], several.added, width))
            held = {name: CACHES["hola"](data[0], memory.added, width) for name, memory in memories.items()}
            trial["ms+hola-flat"] = several.recall(held["rwkv7"], flat=True)
            trial["single"] = single.recall()
            trial["single+hola"] = single.recall(CACHES["hola"](data[0], single.added, width))
            trial["needle-in-cache"] = several.held(held["rwkv7"])
            for name, memory in memories.items():
                trial[name], trial[f"{name}+hola"] = memory.recall(), memory.recall(held[name])
                trial[f"{name}-in-cache"] = memory.held(held[name])
            trials.append(trial)
    return sorted(trials, key=lambda trial: plan.caches.index(trial["width"]))


def _grid(plan: Plan) -> Iterator[tuple[Setting, str, int, Sequence, Case]]:
    """Every setting, policy and seed; all policies cut the same sequences."""
    for setting in plan.states:
        seeds = [500 + 31 * seed + setting.segments for seed in range(plan.seeds)]
        drawn = [_case(plan, setting, seed) for seed in seeds]
        for policy in POLICIES:
            for seed, (data, case) in enumerate(drawn):
                yield setting, policy, seed, data, case


def _case(plan: Plan, setting: Setting, seed: int) -> tuple[Sequence, Case]:
    draws = Draws(seed)
    keys, values, places = needles(draws, setting.segments, setting.length, plan.width)
    contributions = (values[:, :, None] * keys[:, None, :]).reshape(len(keys), -1)
    return (keys, values, places), Case(contributions, places, setting.budget, draws, plan.tau)


def _about(metric: str, setting: Setting, seed: int, length: int) -> Trial:
    return {
        "metric": metric,
        "nseg": setting.segments,
        "nfill": setting.length,
        "K": setting.budget,
        "seed": seed,
        "T": length,
    }


ROW_KEYS = ("metric", "config", "policy", "width", "nseg", "nfill", "K")  # what makes trials a row


def rows(trials: Iterable[Trial]) -> list[Trial]:
    """The means over seeds, in the order of the trials."""
    groups = grouped(trials)
    return [
        {**dict(key), **{name: float(np.mean([trial[name] for trial in group])) for name in _figures(group[0])}}
        for key, group in groups.items()
    ]


def grouped(trials: Iterable[Trial]) -> dict[tuple[tuple[str, Any], ...], list[Trial]]:
    """The trials of each row."""
    groups: dict[tuple[tuple[str, Any], ...], list[Trial]] = {}
    for trial in trials:
        groups.setdefault(tuple((key, trial[key]) for key in ROW_KEYS if key in trial), []).append(trial)
    return groups


def _figures(trial: Trial) -> list[str]:
    return [name for name in trial if name not in (*ROW_KEYS, "seed", "T")]
