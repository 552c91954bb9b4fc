"""Pictures of calibrations: what was measured of the whole model, and what is predicted from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from trainc.runtime.noise_scale import figures
from trainc.runtime.noise_scale.figures import Clause
from trainc.runtime.report.axes import arrows, decades, legend_below, whole_numbers
from trainc.runtime.report.run_records import RunRecords

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DECADES = 20.0
"""How many times the least value the largest is where axes are logarithmic."""
INSIDE = (0.2, 0.4, 0.6, 0.8)
"""Where in the panel arrows stand on a line."""
Ends = tuple[float, float]


def draw_calibration(axes: Axes, run: RunRecords, clause: Clause, color: str) -> None:
    """Draw the whole model's noise scale against that of the clause's layers.

    Dots are measured, coloured by age; the line is the slope at the end of the run with its interval, the diamond what
    it predicts there.
    """
    found = figures.points(run.records, clause.label, run.counter)
    at, norms, total = (list(column) for column in zip(*found, strict=True))
    _dots(axes, run, at, norms, total)
    level = "interval" if clause.level is None else f"{clause.level:.0%} interval"
    now = _prediction(axes, run, clause, color)
    xs, ys = [*norms, *now[:1]], [*total, *now[1:]]
    log = min(xs + ys) > 0 and any(max(vs) > DECADES * min(vs) for vs in (xs, ys))
    _line(axes, run, clause, color, level, _ends(xs, log), log)
    _scales(axes, _ends(xs, log), _ends(ys, log), log)
    axes.set_xlabel(f"noise scale of the measured layers, {clause.unit}")
    axes.set_ylabel(f"of all layers, {clause.unit}")
    legend_below(axes)


def _dots(
    axes: Axes, run: RunRecords, at: Sequence[float], norms: Sequence[float], total: Sequence[float]
) -> None:
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    # The brightest end of the map is lost on white.
    colors = ListedColormap([colormaps["viridis"](0.9 * i / 255) for i in range(256)])
    axes.plot(norms, total, color="#999999", linewidth=0.6, zorder=1, label="_course")
    dots = axes.scatter(norms, total, c=at, cmap=colors, s=18, label="measured", zorder=3)
    dots.set_clim(0, run.positions[-1])
    assert axes.figure is not None
    bar = axes.figure.colorbar(dots, ax=axes, pad=0.01, label=run.counter)
    whole_numbers(bar.ax.yaxis, 6)


def _prediction(axes: Axes, run: RunRecords, clause: Clause, color: str) -> tuple[float, ...]:
    """Draw what is predicted at the end of the run, with its interval; return x and y, nothing where it is unknown."""
    label = clause.label
    x, y, low, high = (
        figures.last(run.records, name)
        for name in (label, f"{label}.total", f"{label}.total_low", f"{label}.total_high")
    )
    if not (math.isfinite(x) and math.isfinite(y)):
        return ()
    axes.plot([x], [y], "D", color=color, markersize=5, zorder=4, label="predicted at the end")
    reach = [[y - low if low > 0 else 0.0], [high - y if high < math.inf else 0.0]]
    axes.errorbar([x], [y], yerr=reach, color=color, linewidth=1.2, zorder=4)
    if high == math.inf:
        arrows(axes, [x], [y], "up", color, "predicted")
    if low == 0:
        arrows(axes, [x], [y], "down", color, "predicted")
    return x, y


def _line(
    axes: Axes, run: RunRecords, clause: Clause, color: str, level: str, ends: Ends, log: bool
) -> None:
    """Draw the slope over the panel, with its interval as far as it is bounded."""
    slope, low, high = _slope(run, clause)
    if math.isfinite(slope):
        ys = [slope * x for x in ends]
        axes.plot(ends, ys, color=color, linewidth=1.3, zorder=2, label=f"{slope:.3g} times")
    if not (low > 0 or high < math.inf):
        return
    floor = max(low, 0.0)
    text = f"{floor:.3g} to {high:.3g}" if high < math.inf else f"above {floor:.3g}"
    # A logarithmic axis has no zero: there the band begins at the line.
    below = slope if log and not low > 0 else floor
    above = high if high < math.inf else slope
    # Where there is no line either, the end that is known is all there is to draw.
    below, above = (above if math.isnan(below) else below), (below if math.isnan(above) else above)
    for end in (below, above):
        axes.plot(
            ends, [end * x for x in ends], color=color, alpha=0.4, linewidth=0.6, label="_end"
        )
    axes.fill_between(
        ends,
        [below * x for x in ends],
        [above * x for x in ends],
        color=color,
        alpha=0.15,
        linewidth=0,
        label=f"{level}, {text}",
    )
    inside = [ends[0] + part * (ends[1] - ends[0]) for part in INSIDE]
    if log:
        inside = [ends[0] * (ends[1] / ends[0]) ** part for part in INSIDE]
    if high == math.inf:
        arrows(axes, inside, [above * x for x in inside], "up", color, "slope")
    if log and not low > 0:
        arrows(axes, inside, [below * x for x in inside], "down", color, "slope")


def _slope(run: RunRecords, clause: Clause) -> tuple[float, float, float]:
    """Return slope, low and high of the last calibration; of a step that measured nothing there is no slope."""
    names = [f"{clause.label}.{name}" for name in ("slope", "slope_low", "slope_high")]
    for record in reversed(run.records):
        measured = math.isfinite(record.get(f"{clause.label}.signal", math.nan))
        if measured and all(name in record for name in names):
            slope, low, high = (float(record[name]) for name in names)
            return slope, low, high
    return math.nan, math.nan, math.nan


def _ends(values: Sequence[float], log: bool) -> Ends:
    """Return the ends of an axis, by the points alone: an interval may leave the picture."""
    return (min(values) / 1.5, max(values) * 1.5) if log else (0.0, 1.1 * max(values))


def _scales(axes: Axes, x: Ends, y: Ends, log: bool) -> None:
    axes.set_xlim(*x)
    axes.set_ylim(*y)
    if log:
        axes.set_xscale("log")
        axes.set_yscale("log")
        decades(axes.xaxis, *x)
        decades(axes.yaxis, *y)
