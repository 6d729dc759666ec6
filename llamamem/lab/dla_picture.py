"""The picture of the DLA lab: bounds, recall, and two updates on the same blocks. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path

from llamamem.lab.dla import Results, rows
from llamamem.lab.pictures import drawing

_RECALL = (
    ("recall_hrm_delta", "one state, delta rule"),
    ("recall_hrm_rwkv7", "one state, RWKV-7"),
    ("recall_fixed", "fixed blocks, sums"),
    ("recall_dla", "DLA's blocks, sums"),
)


def draw(results: Results, path: Path) -> None:
    """Writes a PNG. Raises LlamamemError when matplotlib is missing."""
    with drawing(path, (11.0, 3.4)) as figure:
        left, middle, right = figure.subplots(1, 3)
        bound, recall, states = (rows(trials) for trials in (results.bound, results.recall, results.states))
        _bars(left, [f"{row['nseg']} in {row['K']}" for row in bound], {
            "fixed blocks": [row["bound_fixed"] for row in bound],
            "DLA's blocks": [row["bound_dla"] for row in bound],
        })  # fmt: skip
        left.set(xlabel="segments in K blocks", ylabel="deviation bound, lower is better")
        _bars(middle, [f"{row['nseg']} in {row['K']}" for row in recall], {
            label: [row[name] for row in recall] for name, label in _RECALL
        })  # fmt: skip
        middle.set(xlabel="needles in K blocks", ylabel="recall (cosine)", ylim=(0, 1.35))
        for setting, marker in zip(results.plan.states, "os^Dv", strict=False):
            mine = [row for row in states if row["nseg"] == setting.segments and row["nfill"] == setting.length]
            places = [row["policy"] for row in mine]
            label = f"{setting.segments} needles, K {setting.budget}"
            line = right.plot(places, [row["recall_rwkv7_state"] for row in mine], f"{marker}-", label=label)
            right.plot(places, [row["recall_linear_state"] for row in mine], f"{marker}:", color=line[0].get_color())
        right.set(ylabel="recall: RWKV-7 (line), a sum (dotted)", ylim=(0, 1.05))
        for axes in (left, middle, right):
            axes.grid(axis="y", alpha=0.3)
        for axes in (left, middle):
            axes.legend(loc="upper left")
        right.legend(loc="lower left")


def _bars(axes, places: list[str], groups: dict[str, list[float]]) -> None:  # type: ignore[no-untyped-def]
    width = 0.8 / len(groups)
    for i, (label, heights) in enumerate(groups.items()):
        axes.bar([x + (i - (len(groups) - 1) / 2) * width for x in range(len(places))], heights, width, label=label)
    axes.set_xticks(range(len(places)), places)
