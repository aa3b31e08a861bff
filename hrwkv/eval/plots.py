"""The pictures of a report: passkey heatmaps side by side, and KL and agreement by context length.

Figures are built as objects on the Agg canvas: no display is needed and no global plotting state is touched.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hrwkv.eval.needle import Grid
from hrwkv.eval.perplexity import Scores

PANELS_PER_ROW = 4
DARK_BELOW = 0.6  # of the colour scale: white numbers below, black ones above


def passkey_heatmaps(path: Path, grids: Mapping[str, Grid]) -> None:
    """One panel per model: prompt length to the right, depth downwards, accuracy as colour and number."""
    from matplotlib.figure import Figure

    rows = math.ceil(len(grids) / PANELS_PER_ROW)
    columns = math.ceil(len(grids) / rows)
    width = max(len(grid.lengths) for grid in grids.values())
    height = max(len(grid.depths) for grid in grids.values())
    panel = (max(2.4, 0.62 * width + 0.5), max(1.9, 0.45 * height + 0.9))
    figure = Figure(figsize=(panel[0] * columns + 1.3, panel[1] * rows + 0.5), layout="constrained", dpi=130)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    image: Any = None
    for number, (axis, (name, grid)) in enumerate(zip(axes, grids.items(), strict=False)):
        image = _heatmap(axis, grid)
        samples = grid.samples
        axis.set_title(f"{name}: {grid.accuracy:.0%}", fontsize=10)
        if number % columns == 0:
            axis.set_ylabel("depth of the key")
        if number + columns >= len(grids):
            axis.set_xlabel("prompt length (tokens)")
    for axis in axes[len(grids) :]:
        axis.set_axis_off()
    figure.suptitle(f"Passkey retrieval, exact match, prompts per cell: {samples}", fontsize=11)
    figure.colorbar(image, ax=list(axes), label="accuracy (%)", fraction=0.04, pad=0.01)
    figure.savefig(path)


def _heatmap(axis: Any, grid: Grid) -> Any:
    """One grid; the colour scale is always 0 to 100 %, so that panels can be compared."""
    cells = [[100 * row[depth] / grid.samples for row in grid.correct] for depth in range(len(grid.depths))]
    image = axis.imshow(cells, vmin=0, vmax=100, cmap="viridis", aspect="auto")
    axis.set_xticks(range(len(grid.lengths)), [str(length) for length in grid.lengths], fontsize=8)
    axis.set_yticks(range(len(grid.depths)), [f"{depth:.0%}" for depth in grid.depths], fontsize=8)
    for y, line in enumerate(cells):
        for x, value in enumerate(line):
            colour = "white" if value < 100 * DARK_BELOW else "black"
            axis.text(x, y, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=8)
    return image


def position_curves(path: Path, curves: Mapping[str, Sequence[Scores]]) -> None:
    """KL(teacher || model) and top-1 agreement over the length of the context; one line per model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4.2), layout="constrained", dpi=130)
    left, right = figure.subplots(1, 2)
    longest = max(curves.values(), key=len)
    labels = [f"{scores.first}-{scores.last}" for scores in longest]
    place = {scores.first: number for number, scores in enumerate(longest)}
    for name, scores in curves.items():
        x = [place[bucket.first] for bucket in scores if bucket.first in place]
        left.plot(x, [bucket.kl for bucket in scores if bucket.first in place], marker="o", label=name)
        shares = [100 * (bucket.agreement or 0.0) for bucket in scores if bucket.first in place]
        right.plot(x, shares, marker="o", label=name)
    left.set_ylabel("KL(teacher || model), nats per token")
    left.set_yscale("log")
    right.set_ylabel("top-1 agreement with the teacher (%)")
    for axis in (left, right):
        axis.set_xticks(range(len(labels)), labels, rotation=30, ha="right", fontsize=8)
        axis.set_xlabel("tokens of context")
        axis.grid(alpha=0.3)
    right.legend(fontsize=8)
    figure.savefig(path)
