"""Pictures of noise scales by layer, over a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from trainc.runtime.noise_figures import Clause
from trainc.runtime.plot_axes import along_run, decades
from trainc.runtime.records import RunRecords, without_loss

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MISSING = "#c4c4c4"
COLUMNS = 400
"""How many columns of a heat map can be told apart."""
NAMED = 110
"""How many layers of a heat map can be named."""


def layer_rows(run: RunRecords, label: str) -> int:
    """Return how many layers a run recorded for a clause."""
    return max((len(r.get("series", {}).get(label, ())) for r in run.records), default=0)


def map_height(rows: int) -> float:
    """Return the inches that a heat map takes, with title and axis."""
    return 1.1 + 0.2 * min(max(rows, 4), 24) + 0.09 * min(max(rows - 24, 0), NAMED - 24)


def draw_layers(axes: Axes, run: RunRecords, clause: Clause, runs: Sequence[RunRecords]) -> None:
    """Draw layers over the run as a heat map, in the order of the model from top to bottom.

    The axis is long enough for all `runs` that are drawn.
    """
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Patch

    names, edges, values = heat(run, clause.label)
    low, high = _common(values)
    colors = colormaps["viridis"].with_extremes(bad=MISSING)
    # One value alone would leave the scale of colours without a width.
    high = high if high > low else 1.01 * low
    rows = [index - 0.5 for index in range(len(names) + 1)]
    mesh = axes.pcolormesh(
        edges, rows, values, norm=LogNorm(low, high), cmap=colors, rasterized=True
    )
    axes.invert_yaxis()
    axes.grid(False)
    every = math.ceil(len(names) / NAMED)
    axes.set_yticks(range(0, len(names), every), names[::every])
    axes.tick_params(axis="y", length=2, labelsize=8 if len(names) <= 24 else 6)
    along_run(axes, runs, margin=0.0)
    assert axes.figure is not None
    bar = axes.figure.colorbar(mesh, ax=axes, pad=0.01, aspect=30, extend="both", extendfrac=0.02)
    bar.set_label(clause.unit, fontsize=9)
    # A number takes a fifth of an inch with the space around it.
    decades(bar.ax.yaxis, low, high, most=int((map_height(len(names)) - 1) / 0.2))
    if any(math.isnan(value) for row in values for value in row):
        missing = [Patch(facecolor=MISSING, label="undetermined")]
        axes.legend(handles=missing, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2)


def heat(run: RunRecords, label: str) -> tuple[list[str], list[float], list[list[float]]]:
    """Return layers, edges of the columns (columns + 1) and values (layers, columns); NaN is undetermined.

    A step that was skipped for its loss has a column, too. Of a long run a column is several steps, with the last
    one's value: that is an average over steps already.
    """
    measured = [r for r in run.records if label in r.get("series", {}) or without_loss(r)]
    first = run.records.index(measured[0])
    before = [r[run.counter] for r in run.records[:first] if run.counter in r]
    size = math.ceil(len(measured) / COLUMNS)
    shown = measured[size - 1 :: size]
    if len(measured) % size:
        shown.append(measured[-1])
    found = [record.get("series", {}).get(label, {}) for record in shown]
    names = list(next(r["series"][label] for r in reversed(measured) if "series" in r))
    edges = [before[-1] if before else 0, *(record[run.counter] for record in shown)]
    values = [[column.get(name, math.nan) for column in found] for name in names]
    return names, edges, values


def _common(values: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Return the ends of the scale of colours: one value in a hundred may lie beyond each."""
    finite = sorted(v for row in values for v in row if math.isfinite(v) and v > 0)
    if not finite:
        return 0.5, 2.0
    return finite[len(finite) // 100], finite[-1 - len(finite) // 100]
