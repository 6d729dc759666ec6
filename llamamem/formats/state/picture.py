"""A picture of a memory: a row a target layer, a matrix a state, all on one colour scale. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llamamem.errors import LlamamemError
from llamamem.formats.gguf_file import replacing
from llamamem.formats.regular import open_regular
from llamamem.formats.state.file import State
from llamamem.formats.state.math import norms

_MAX_MATRICES = 512


def draw_state(state: State, path: Path, layers: Sequence[int], title: str) -> None:
    """Writes a PNG of the memory of one sequence; `layers` are the numbers to write beside the rows.

    A matrix is drawn as S[i, j]: rows are what is read out, columns what it is asked with. The state that the next
    token is written to has a frame. Raises LlamamemError when matplotlib is missing or there is too much to draw.
    """
    columns = state.heads * state.states
    if state.cells != 1:
        raise LlamamemError(f"{path}: a picture is that of one sequence, this state holds {state.cells}")
    if state.layers * columns > _MAX_MATRICES:
        raise LlamamemError(f"{path}: {state.layers * columns} matrices are too many for a picture of {_MAX_MATRICES}")
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise LlamamemError(
            f"{path}: pictures need matplotlib; run `pip install -e '.[plots]'` in llamamem's checkout"
        ) from None

    side = min(1.25, 40 / state.layers, 40 / columns)  # inches of a matrix
    with rc_context({"font.family": "sans-serif", "font.size": 8}):
        width, height = columns * (side + 0.25) + 1.9, state.layers * (side + 0.3) + 1.0
        figure = Figure(figsize=(max(width, 5.5), height), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(state.layers, columns, squeeze=False)
        image = _matrices(state, axes, layers)
        bar = figure.colorbar(image, ax=axes, shrink=min(1.0, 3.5 / height), pad=0.02)
        bar.set_label("one scale for all")
        framed = "; framed: written to next" if state.states > 1 else ""
        figure.suptitle(f"{title}\nS[i, j] of every layer and state{framed}", fontsize=9)
        with replacing(path) as part:
            figure.savefig(part, format="png", metadata={"Software": None})


def _matrices(state: State, axes: Any, layers: Sequence[int]) -> Any:
    norm, largest = norms(state)
    scale = float(largest.max()) or 1.0  # of a memory that is empty
    image = None
    for layer, row in enumerate(axes):
        for column, ax in enumerate(row):
            head, m = divmod(column, state.states)
            image = ax.imshow(state.S[0, layer, head, m], cmap="RdBu_r", vmin=-scale, vmax=scale)
            ax.set(xticks=[], yticks=[])
            name = f"state {m}" if state.heads == 1 else f"head {head}, state {m}"
            live = norm[0, layer, head, m] > 0
            text = f"max {largest[0, layer, head, m]:#.2g}" if live else "empty"
            ax.set_title(f"{name}\n{text}" if layer == 0 else text, pad=3)
            if not live:
                ax.patch.set(facecolor="white", hatch="///", edgecolor="0.85")
                ax.images[0].set_visible(False)
            current = state.states > 1 and m == state.current_state[0, layer]
            for spine in ax.spines.values():
                spine.set(edgecolor="black" if current else "0.8", linewidth=1.8 if current else 0.6)
        row[0].set_ylabel(f"layer {layers[layer]}", fontsize=9)
    return image


def is_png(path: Path) -> bool:
    with open_regular(path) as file:
        return file.read(8) == b"\x89PNG\r\n\x1a\n"
