"""What claims report: means over seeds with intervals, crossings of curves, lines through the origin."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from benchmarks.measure import Json
from trainc.runtime.report.student_t import student_t_quantile

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEVEL = 0.9
"""The probability of every interval."""


def over_seeds(values: Sequence[float], level: float = LEVEL) -> Json:
    """Return the mean over seeds, Student's interval of it at `level`, and the values themselves."""
    mean = fmean(values)
    margin = math.nan
    if len(values) > 1:
        margin = student_t_quantile(level, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return {
        "mean": round(mean, 4),
        "interval": None
        if math.isnan(margin)
        else [round(mean - margin, 4), round(mean + margin, 4)],
        "by seed": [round(value, 4) for value in values],
    }


def beyond(figure: Json, side: int) -> bool | None:
    """Say whether an interval lies above 0, or below it for a negative side; None without one."""
    interval = figure["interval"]
    return None if interval is None else min(side * end for end in interval) > 0


def to_others(
    found: Mapping[str, Sequence[float]], against: Sequence[str]
) -> dict[str, dict[str, Json]]:
    """Return for each method its figures over seeds, and their differences from those of other methods."""
    told: dict[str, dict[str, Json]] = {}
    for name, values in found.items():
        told[name] = {"figure": over_seeds(values)}
        for other in against:
            if other != name:
                pairs = zip(values, found[other], strict=True)
                told[name][f"to {other}"] = over_seeds([a - b for a, b in pairs])
    return told


def draw_rows(axes: "Axes", rows: Mapping[str, Json]) -> None:
    """Draw figures over seeds below each other: means, intervals, and the seeds as gray dots."""
    for place, row in enumerate(rows.values()):
        low, high = row["interval"] or (row["mean"], row["mean"])
        axes.plot([low, high], [place, place], color="tab:blue", linewidth=2)
        axes.plot(row["by seed"], [place] * len(row["by seed"]), ".", color="gray", alpha=0.6)
        axes.plot(row["mean"], place, "o", color="tab:blue")
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()


def trailing_mean(values: Sequence[float], count: int) -> list[float]:
    """Return at each place the mean of the last `count` values, of fewer at the start."""
    return [fmean(values[max(0, i + 1 - count) : i + 1]) for i in range(len(values))]


def first_crossing(x: Sequence[float], y: Sequence[float], level: float) -> float:
    """Return the x at which the line through the points first comes down to `level`; infinite if it never does."""
    if y[0] <= level:
        return float(x[0])
    for i in range(1, len(y)):
        if y[i] <= level:
            part = (y[i - 1] - level) / (y[i - 1] - y[i])
            return x[i - 1] + part * (x[i] - x[i - 1])
    return math.inf


def correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Return Pearson's correlation; NaN where one of the two does not vary."""
    middle_x, middle_y = fmean(x), fmean(y)
    xx = sum((a - middle_x) ** 2 for a in x)
    yy = sum((b - middle_y) ** 2 for b in y)
    xy = sum((a - middle_x) * (b - middle_y) for a, b in zip(x, y, strict=True))
    return xy / math.sqrt(xx * yy) if xx > 0 and yy > 0 else math.nan


def slope_through_origin(x: Sequence[float], y: Sequence[float]) -> float:
    """Return the least-squares s of y = s x."""
    return sum(a * b for a, b in zip(x, y, strict=True)) / sum(a * a for a in x)
