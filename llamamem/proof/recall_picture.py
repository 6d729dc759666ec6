"""The picture of a recall table: by number of facts and by gap, with memory and without. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path

from llamamem.errors import LlamamemError
from llamamem.formats.gguf_file import replacing
from llamamem.proof.recall import RecallReport

_LINES = (
    ("memory", "o-", "its memory restored"),
    ("foreign", "s--", "another one's memory"),
    ("none", "x:", "no memory"),
)


def draw_recall(report: RecallReport, path: Path) -> None:
    """Writes a PNG. Raises LlamamemError when matplotlib is missing."""
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise LlamamemError(
            f"{path}: pictures need matplotlib; run `pip install -e '.[plots]'` in llamamem's checkout"
        ) from None

    gap = max({row.gap for row in report.rows}, key=lambda g: sum(row.gap == g for row in report.rows))
    facts = max({row.facts for row in report.rows}, key=lambda f: sum(row.facts == f for row in report.rows))
    by_facts = sorted((row for row in report.rows if row.gap == gap), key=lambda row: row.facts)
    by_gap = sorted((row for row in report.rows if row.facts == facts), key=lambda row: row.gap)
    with rc_context({"font.family": "sans-serif", "font.size": 8}):
        figure = Figure(figsize=(8.0, 3.0), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2, sharey=True)
        for name, style, label in _LINES:
            for axes, rows, along in ((left, by_facts, "facts"), (right, by_gap, "gap")):
                places = [str(getattr(row, along)) for row in rows]
                axes.plot(places, [getattr(row, name) for row in rows], style, label=label)
        left.set(xlabel=f"facts ({gap} tokens of other talk after them)", ylabel="answered right", ylim=(0, 1.05))
        right.set(xlabel=f"tokens of other talk after {facts} facts")
        for axes in (left, right):
            axes.axhline(report.chance, color="0.6", linewidth=0.6)
            axes.grid(alpha=0.3)
        left.legend(loc="center left")
        figure.suptitle("Asked in a new conversation, the KV cache gone; the thin line is chance", fontsize=9)
        with replacing(path) as part:
            figure.savefig(part, format="png", metadata={"Software": None})
