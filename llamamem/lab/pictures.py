"""A PNG by matplotlib, which only pictures need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llamamem.errors import LlamamemError
from llamamem.formats.gguf_file import replacing


@contextmanager
def drawing(path: Path, size: tuple[float, float]) -> Iterator[Any]:
    """An empty figure, `size` in inches, which is written when all went well. Raises LlamamemError."""
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise LlamamemError(
            f"{path}: pictures need matplotlib; run `pip install -e '.[plots]'` in llamamem's checkout"
        ) from None
    with rc_context({"font.family": "sans-serif", "font.size": 8, "legend.fontsize": 7}):
        figure = Figure(figsize=size, dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        with replacing(path) as part:
            figure.savefig(part, format="png", metadata={"Software": None})
