"""Panels of a positive quantity by layer: a heat map over the run, and intervals at its end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.patches import Patch

from trainc.runtime.report.axes import arrows, log_ticks, set_run_axis
from trainc.runtime.report.run_records import RunRecords, has_non_finite_loss

LayerFigures = Mapping[str, Mapping[str, float]]
"""The figures of one step: quantity -> layer -> value."""
MISSING = "#c4c4c4"
COLUMNS = 400
"""The largest number of columns of a heat map."""
NAMED = 110
"""The largest number of rows of a heat map of which each gets a name."""


def count_layers(run: RunRecords, quantity: str) -> int:
    """Return of how many layers a run recorded a quantity."""
    return max((len(r.get("series", {}).get(quantity, ())) for r in run.records), default=0)


def map_height(rows: int) -> float:
    """Return the height of a heat map in inches, with title and axis."""
    return 1.1 + 0.2 * min(max(rows, 4), 24) + 0.09 * min(max(rows - 24, 0), NAMED - 24)


def draw_layers(
    axes: Axes, run: RunRecords, quantity: str, unit: str, runs: Sequence[RunRecords]
) -> None:
    """Draw a positive quantity over the run as a heat map, its layers in the order of the model from top to bottom.

    The axis is that of all `runs` in the picture.
    """
    names, edges, values = heat_map(run, quantity)
    low, high = _color_limits(values)
    colors = colormaps["viridis"].with_extremes(bad=MISSING)
    # With a single value the colour scale would have no width.
    high = high if high > low else 1.01 * low
    rows = [index - 0.5 for index in range(len(names) + 1)]
    mesh = axes.pcolormesh(
        edges, rows, values, norm=LogNorm(low, high), cmap=colors, rasterized=True
    )
    axes.invert_yaxis()
    axes.grid(False)
    _name_rows(axes, names)
    set_run_axis(axes, runs, margin=0.0)
    assert axes.figure is not None
    bar = axes.figure.colorbar(mesh, ax=axes, pad=0.01, aspect=30, extend="both", extendfrac=0.02)
    bar.set_label(unit, fontsize=9)
    # A label with the space around it is a fifth of an inch high.
    log_ticks(bar.ax.yaxis, low, high, most=int((map_height(len(names)) - 1) / 0.2))
    if any(math.isnan(value) for row in values for value in row):
        missing = [Patch(facecolor=MISSING, label="undetermined")]
        axes.legend(handles=missing, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2)


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    every = math.ceil(len(names) / NAMED)
    axes.set_yticks(range(0, len(names), every), names[::every])
    axes.tick_params(axis="y", length=2, labelsize=8 if len(names) <= 24 else 6)


def heat_map(run: RunRecords, quantity: str) -> tuple[list[str], list[float], list[list[float]]]:
    """Return layers, edges of the columns (columns + 1) and values (layers, columns); NaN is undetermined.

    A step that was skipped for its loss has a column, too. In a long run a column is several steps and has the value
    of the last one, which is an average over steps already.
    """
    measured = [r for r in run.records if quantity in r.get("series", {}) or has_non_finite_loss(r)]
    first = run.records.index(measured[0])
    before = [r[run.counter] for r in run.records[:first] if run.counter in r]
    size = math.ceil(len(measured) / COLUMNS)
    shown = measured[size - 1 :: size]
    if len(measured) % size:
        shown.append(measured[-1])
    found = [record.get("series", {}).get(quantity, {}) for record in shown]
    names = list(next(r["series"][quantity] for r in reversed(measured) if "series" in r))
    edges = [before[-1] if before else 0, *(record[run.counter] for record in shown)]
    values = [[column.get(name, math.nan) for column in found] for name in names]
    return names, edges, values


def _color_limits(values: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Return the ends of the colour scale: one value in a hundred may be beyond each."""
    finite = sorted(v for row in values for v in row if math.isfinite(v) and v > 0)
    if not finite:
        return 0.5, 2.0
    return finite[len(finite) // 100], finite[-1 - len(finite) // 100]


def last_with_bounds(run: RunRecords, ends: tuple[str, str]) -> LayerFigures | None:
    """Return the last figures by layer that have a bound of an interval; None where there are none."""
    for record in reversed(run.records):
        series: LayerFigures = record.get("series", {})
        bounds = [series.get(end, {}).values() for end in ends]
        if any(0 < value < math.inf for values in bounds for value in values):
            return series
    return None


def draw_last_intervals(
    axes: Axes,
    color: str,
    quantity: str,
    ends: tuple[str, str],
    series: LayerFigures,
    text: str,
) -> None:
    """Draw the last value of every layer with its interval, in the order of the heat map; `text` is of the axis."""
    names = list(series[quantity])
    rows = range(len(names))
    value, low, high = (
        [series[part].get(name, math.nan) for name in names] for part in (quantity, *ends)
    )
    axes.plot(value, rows, "o", color=color, markersize=4, label="_value")
    bounds = [(v, i) for part in (low, high) for i, v in enumerate(part) if 0 < v < math.inf]
    at, of = [v for v, _ in bounds], [i for _, i in bounds]
    axes.plot(at, of, "|", color=color, markersize=7, label="_known ends")
    for row in rows:
        known = [v for v in (low[row], value[row], high[row]) if 0 < v < math.inf]
        if not known:
            continue
        axes.plot(
            [min(known), max(known)], [row, row], color=color, linewidth=1.2, label="_interval"
        )
        if low[row] == 0:
            arrows(axes, [min(known)], [row], "left", color, names[row])
        if high[row] == math.inf:
            arrows(axes, [max(known)], [row], "right", color, names[row])
    axes.set_xscale("log")
    axes.set_ylim(len(names) - 0.5, -0.5)
    _name_rows(axes, names)
    axes.set_xlabel(text)
    log_ticks(axes.xaxis, *axes.get_xlim())
