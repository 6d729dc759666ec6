"""Measured figures against the published ones, and the verdicts that were published with them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

from llamamem.lab.dla import Results, Trial, rows

EXACT = 1e-6  # of trials, and of rows that are known with all digits; of a bound, which is not below 1, relative
PRINTED = 0.0005 + 1e-9  # of figures that are known with three digits
IN_CACHE = 0.005 + 1e-9  # of shares that are known with two
CACHED = 0.01  # of a row with a cache: rounding decides which of several needles that are worth the same it keeps
TIE = 1e-6

STATE_COLUMNS = ("ms", "ms+recency", "single")
CACHE_COLUMNS = ("ms+hola", "ms+hola-plain", "ms+hola-flat", "single+hola")
BAD = ("fixed", "noisy_dla", "low_k_dla")  # policies whose boundaries are not perfect

_KEYS = ("config", "policy", "width", "nseg", "nfill", "K", "seed")


@dataclass(frozen=True)
class Finding:
    """One published thing: how many figures it has, and in words which differ."""

    what: str
    figures: int
    differ: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return self.figures > 0 and not self.differ


@cache
def published() -> dict[str, Any]:
    """The published figures; `source` says where they are from."""
    figures: dict[str, Any] = json.loads(Path(__file__).with_name("dla_published.json").read_text(encoding="utf-8"))
    return figures


def check(results: Results) -> list[Finding]:
    """Every published figure against what was measured with the same seeds and sizes."""
    findings = [Finding("log-linear attention: both forms are the same", 1, () if results.smoke else ("they differ",))]
    for name, trials in (("bound", results.bound), ("recall", results.recall), ("state_only", results.states)):
        theirs = published()[name]
        findings.append(_compare(f"{name}: trials", trials, theirs["trials"], EXACT))
        findings.append(_compare(f"{name}: rows", rows(trials), theirs["rows"], EXACT))
    findings += [Finding(name, 1, () if holds else ("it does not",)) for name, holds in verdicts(results).items()]
    if results.caches:
        findings += _check_caches(results)
    return findings


def _check_caches(results: Results) -> list[Finding]:
    ours, theirs = rows(results.caches), published()["hola"]
    several = [
        {"policy": row["policy"], "nseg": row["nseg"], "ms": row["recall_rwkv7_state"]}
        for row in published()["state_only"]["rows"]
    ]
    plain = [name for name in theirs["backbones"][0] if name in ("gdn", "rwkv7", "linear")]
    cached = [f"{name}+hola" for name in plain]
    return [
        _compare("hola: several states without a cache, all digits", ours, several, EXACT),
        _compare("hola: states without a cache, and recency", ours, theirs["rows"], PRINTED, STATE_COLUMNS),
        _compare("hola: states with a cache", ours, theirs["rows"], CACHED, CACHE_COLUMNS),
        _compare("hola: needles in the cache", ours, theirs["rows"], IN_CACHE, ("needle-in-cache",)),
        _compare("hola: other updates without a cache", ours, theirs["backbones"], PRINTED, plain),
        _compare("hola: other updates with a cache", ours, theirs["backbones"], CACHED, cached),
        *(
            Finding(f"hola: {name}", 1, () if passes and close else (f"{value:+.4f}",))
            for name, (value, passes, close) in hypotheses(ours).items()
        ),
    ]


def _compare(
    what: str, ours: Iterable[Trial], theirs: list[Trial], within: float, columns: Sequence[str] | None = None
) -> Finding:
    """Each published line has the measured lines with its keys; every one of them has its figures."""
    ours, figures, differ = list(ours), 0, []
    for line in theirs:
        keys = {key: line[key] for key in _KEYS if key in line}
        found = [one for one in ours if all(one[key] == value for key, value in keys.items())]
        if not found:
            differ.append(f"{_named(keys)}: not measured")
        for one in found:
            for name in columns or [name for name in line if name not in keys]:
                figures += 1
                if not abs(one[name] - line[name]) <= within * max(1.0, abs(line[name])):
                    differ.append(f"{_named(keys)}: {name} is {one[name]:.7g}, published {line[name]:.7g}")
    return Finding(what, figures, tuple(differ))


def _named(keys: Trial) -> str:
    return " ".join(f"{key} {value}" for key, value in keys.items())


def verdicts(results: Results) -> dict[str, bool]:
    """The verdict lines of the published report."""
    bound, recall, states = rows(results.bound), rows(results.recall), rows(results.states)
    differences = [row["rwkv_minus_linear"] for row in states]
    return {
        "DLA's bound is lower than that of fixed blocks, in every row": all(
            row["bound_dla"] < row["bound_fixed"] for row in bound
        ),
        "DLA recalls more than fixed blocks, in every row of the recall table": all(
            row["recall_dla"] > row["recall_fixed"] for row in recall
        ),
        "DLA recalls more than one state with the delta rule, in every row": all(
            row["recall_dla"] > row["recall_hrm_delta"] for row in recall
        ),
        "DLA recalls more than one state with RWKV-7's update, in every row": all(
            row["recall_dla"] > row["recall_hrm_rwkv7"] for row in recall
        ),
        "several states with RWKV-7's update recall no less than one": all(
            row["recall_hrm_rwkv7_multi"] >= row["recall_hrm_rwkv7"] - TIE for row in recall
        ),
        "on the same blocks RWKV-7's update never recalls less than a sum": all(d >= -TIE for d in differences),
    }


def wins(results: Results) -> tuple[int, int, int]:
    """In how many rows RWKV-7's update, the sum, and neither recalls more on the same blocks."""
    differences = [row["rwkv_minus_linear"] for row in rows(results.states)]
    better, worse = (sum(sign * d > TIE for d in differences) for sign in (1, -1))
    return better, worse, len(differences) - better - worse


def hypotheses(cached: list[Trial]) -> dict[str, tuple[float, bool, bool]]:
    """H1 to H5 of the published appendix: the figure, whether it passes, whether it is about the published one."""
    bad = [row for row in cached if row["policy"] in BAD]
    oracle = {(row["width"], row["nseg"]): row["ms"] for row in cached if row["policy"] == "oracle"}
    gaps = [
        ((row["ms+hola"] - row["ms"]) / gap)
        for row in cached
        if row["policy"] == "low_k_dla" and (gap := oracle[row["width"], row["nseg"]] - row["ms"]) > 0.02
    ]
    wide = [row for row in cached if row["width"] == max(row["width"] for row in cached)]
    gains = {
        name: fmean(row[f"{name}+hola"] - row[name] for row in wide if row["policy"] in BAD)
        for name in ("gdn", "rwkv7", "linear")
    }
    delta = (gains["gdn"] + gains["rwkv7"]) / 2
    h1 = fmean(row["ms+hola"] - row["ms+recency"] for row in bad)
    h2 = fmean(row["ms+hola"] - row["ms+hola-flat"] for row in bad)
    h3 = fmean(gaps) if gaps else 0.0
    h4 = fmean(abs(row["gdn+hola"] - row["rwkv7+hola"]) for row in wide)
    theirs = published()["hola"]["hypotheses"]
    return {
        "H1, the cache helps more than the last tokens do": (h1, h1 > 0.03, abs(h1 - theirs["H1"]) <= CACHED),
        "H2, a sharp read of it helps more than a flat one": (h2, h2 > 0.03, abs(h2 - theirs["H2"]) <= CACHED),
        "H3, it closes half of the gap that too few states leave": (h3, h3 > 0.5, abs(h3 - theirs["H3"]) <= 0.05),
        "H4, gdn and rwkv7 gain the same": (h4, h4 < 0.02, abs(h4 - theirs["H4"]) <= CACHED),
        "H5, updates that erase gain": (delta, gains["linear"] < delta / 2, abs(delta - theirs["H5"]) <= CACHED),
    }
