"""Pictures of examples in rows: one, and those that are shown beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from trainc.runtime.report.picture_file import picture_format

INCHES = 1.15
"""The side of a picture."""


@dataclass(frozen=True, slots=True)
class DrawnExample:
    """A picture (H, W) or (H, W, 3) with values from 0 to 1, and a line above it; `color` marks its frame."""

    pixels: NDArray[np.float32]
    title: str
    color: str = "none"


def draw_examples(rows: Sequence[Sequence[DrawnExample]], path: Path, caption: str) -> Path:
    """Draw rows of examples below a caption into a file and return its path.

    Raises ValueError where there is none.
    """
    columns = max(map(len, rows), default=0)
    if not columns:
        raise ValueError("no sample has an influence above 0: there is nothing to draw")
    figure = Figure(figsize=(columns * INCHES, len(rows) * (INCHES + 0.4) + 0.3), layout="tight")
    every = figure.subplots(len(rows), columns, squeeze=False)
    for row, cells in zip(rows, every, strict=True):
        for i, cell in enumerate(cells):
            _draw(cell, row[i] if i < len(row) else None)
    figure.suptitle(caption, fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A caption may be wider than the examples.
    figure.savefig(path, format=picture_format(path), dpi=160, bbox_inches="tight")
    return path


def _draw(cell: Axes, example: DrawnExample | None) -> None:
    cell.set_xticks([])
    cell.set_yticks([])
    for side in cell.spines.values():
        side.set_visible(example is not None and example.color != "none")
    if example is None:
        return
    cell.imshow(example.pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    cell.set_title(example.title, fontsize=6)
    for side in cell.spines.values():
        side.set_color(example.color if example.color != "none" else "black")
        side.set_linewidth(1.5)
