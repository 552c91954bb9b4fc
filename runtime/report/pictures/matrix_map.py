"""A picture of a matrix of numbers from 0 on, such as the fraction of entries that train in parts of a weight."""

from __future__ import annotations

from matplotlib.axes import Axes
from torch import Tensor


def draw_matrix(axes: Axes, values: Tensor, label: str, rows: int, columns: int) -> None:
    """Draw cells of a weight with this many outputs and inputs: an output is a row, an input a column."""
    image = axes.imshow(
        values.numpy(), aspect="auto", cmap="Greys", vmin=0, interpolation="nearest"
    )
    axes.figure.colorbar(image, ax=axes, label=label)
    axes.set_xlabel(f"inputs ({columns})")
    axes.set_ylabel(f"outputs ({rows})")
    axes.set_xticks([])
    axes.set_yticks([])
