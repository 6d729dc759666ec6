"""The picture of an MQAR comparison: accuracy over the size of the state, and over pairs. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llamamem.lab.intervals import interval
from llamamem.lab.mqar_plan import ARMS
from llamamem.lab.mqar_report import Best, Report
from llamamem.lab.pictures import drawing


def draw(report: Report, path: Path) -> None:
    """Writes a PNG; a bar is the 95 % interval over seeds. Raises LlamamemError when matplotlib is missing."""
    with drawing(path, (9.0, 3.4)) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        hardest, main = report.hardest, report.preset.main
        for i, arm in enumerate(ARMS):
            mine = [best for best in report.best if best.mixer.arm == arm]
            style = {"color": f"C{i}", "marker": "os^Dv"[i], "capsize": 2, "label": arm}
            if arm == "attention":
                for best in mine:
                    left.axhline(best.mean(hardest), color=f"C{i}", linestyle=":", label=f"{arm} (keeps all)")
            else:
                mine = sorted(mine, key=lambda best: best.mixer.state_floats(0))
                sizes = [best.mixer.state_floats(0) for best in mine]
                _points(left, sizes, [(best, hardest) for best in mine], style)
            for best in mine:
                if best.mixer.state_floats(0) in (0, main):
                    _points(
                        right,
                        [part.name for part in report.preset.test],
                        [(best, p) for p in report.preset.test],
                        style,
                    )
        left.set_xscale("log", base=2)
        sizes = sorted({best.mixer.state_floats(0) for best in report.best if best.mixer.arm != "attention"})
        left.set_xticks(sizes, [str(size) for size in sizes])
        left.set(xlabel="floats of the state", ylabel="accuracy", ylim=(0, 1.03))
        left.set_title(f"{hardest.pairs} pairs in {hardest.length} tokens")
        right.set(xlabel="pairs@length of the test")
        right.set_title(f"a state of {main} floats")
        for axes in (left, right):
            axes.grid(alpha=0.3)
        right.legend()
        figure.suptitle(f"{report.heading}; bars are 95 % intervals over seeds", fontsize=9)


def _points(axes: Any, places: list[Any], of: list[tuple[Best, Any]], style: dict[str, Any]) -> None:
    means, halves = [], []
    for best, part in of:
        mean, half = interval([line["accuracy"][part.name] for line in best.lines.values()])
        means.append(mean)
        halves.append(half if half != float("inf") else 0.0)
    axes.errorbar(places, means, yerr=halves, linewidth=1, markersize=4, elinewidth=0.6, **style)
