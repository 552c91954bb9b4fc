"""The panel of a calibration: measured noise scales of the whole model, and the prediction from them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap

from trainc.runtime.noise_scale.history import NoiseScaleClause, calibration_points, last_value
from trainc.runtime.report.axes import arrows, integer_ticks, legend_below, log_ticks
from trainc.runtime.report.run_records import RunRecords

LOG_RATIO = 20.0
"""The ratio of the largest value to the least from which axes are logarithmic."""
ARROWS_AT = (0.2, 0.4, 0.6, 0.8)
"""The positions of arrows on a line, as fractions of the panel."""
Ends = tuple[float, float]
Values = Sequence[float]


def draw_calibration(axes: Axes, run: RunRecords, clause: NoiseScaleClause, color: str) -> None:
    """Draw the whole model's noise scale over that of the clause's layers.

    Dots are calibrations, coloured by position in the run; the line is the slope at the end of the run with its
    interval, the diamond its prediction there.
    """
    found = calibration_points(run.records, clause.label, run.counter)
    at, measured, whole_model = (list(column) for column in zip(*found, strict=True))
    _draw_dots(axes, run, at, measured, whole_model)
    level = f"{clause.level:.0%} interval"
    predicted = _prediction(axes, run, clause, color)
    xs, ys = [*measured, *predicted[:1]], [*whole_model, *predicted[1:]]
    log = min(xs + ys) > 0 and any(max(vs) > LOG_RATIO * min(vs) for vs in (xs, ys))
    _line(axes, run, clause, color, level, _ends(xs, log), log)
    _set_scales(axes, _ends(xs, log), _ends(ys, log), log)
    axes.set_xlabel(f"noise scale of the measured layers, {clause.unit}")
    axes.set_ylabel(f"noise scale of the whole model, {clause.unit}")
    legend_below(axes)


def _draw_dots(axes: Axes, run: RunRecords, at: Values, x: Values, y: Values) -> None:
    # The brightest colours of the map cannot be seen on white.
    colors = ListedColormap([colormaps["viridis"](0.9 * i / 255) for i in range(256)])
    axes.plot(x, y, color="#999999", linewidth=0.6, zorder=1, label="_history")
    dots = axes.scatter(x, y, c=at, cmap=colors, s=18, label="measured", zorder=3)
    dots.set_clim(0, run.positions[-1])
    assert axes.figure is not None
    bar = axes.figure.colorbar(dots, ax=axes, pad=0.01, label=run.counter)
    integer_ticks(bar.ax.yaxis, 6)


def _prediction(
    axes: Axes, run: RunRecords, clause: NoiseScaleClause, color: str
) -> tuple[float, ...]:
    """Draw the prediction at the end of the run with its interval; return x and y, nothing where it is unknown."""
    label = clause.label
    x, y, low, high = (
        last_value(run.records, name)
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
    axes: Axes,
    run: RunRecords,
    clause: NoiseScaleClause,
    color: str,
    level: str,
    ends: Ends,
    log: bool,
) -> None:
    """Draw the slope over the panel, with the bounds of its interval that are known."""
    slope, low, high = _slope(run, clause)
    if math.isfinite(slope):
        ys = [slope * x for x in ends]
        axes.plot(ends, ys, color=color, linewidth=1.3, zorder=2, label=f"slope {slope:.3g}")
    if not (low > 0 or high < math.inf):
        return
    floor = max(low, 0.0)
    text = f"{floor:.3g} to {high:.3g}" if high < math.inf else f"above {floor:.3g}"
    # A logarithmic axis has no zero: there the filled area begins at the line.
    below = slope if log and not low > 0 else floor
    above = high if high < math.inf else slope
    # Without a line either, only the known end is drawn.
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
    inside = [ends[0] + part * (ends[1] - ends[0]) for part in ARROWS_AT]
    if log:
        inside = [ends[0] * (ends[1] / ends[0]) ** part for part in ARROWS_AT]
    if high == math.inf:
        arrows(axes, inside, [above * x for x in inside], "up", color, "slope")
    if log and not low > 0:
        arrows(axes, inside, [below * x for x in inside], "down", color, "slope")


def _slope(run: RunRecords, clause: NoiseScaleClause) -> tuple[float, float, float]:
    """Return slope, low and high of the last calibration whose step has an estimate; NaN without one."""
    names = [f"{clause.label}.{name}" for name in ("slope", "slope_low", "slope_high")]
    for record in reversed(run.records):
        measured = math.isfinite(record.get(f"{clause.label}.signal", math.nan))
        if measured and all(name in record for name in names):
            slope, low, high = (float(record[name]) for name in names)
            return slope, low, high
    return math.nan, math.nan, math.nan


def _ends(values: Sequence[float], log: bool) -> Ends:
    """Return the ends of an axis, by the points alone: an interval may go beyond them."""
    return (min(values) / 1.5, max(values) * 1.5) if log else (0.0, 1.1 * max(values))


def _set_scales(axes: Axes, x: Ends, y: Ends, log: bool) -> None:
    axes.set_xlim(*x)
    axes.set_ylim(*y)
    if log:
        axes.set_xscale("log")
        axes.set_yscale("log")
        log_ticks(axes.xaxis, *x)
        log_ticks(axes.yaxis, *y)
