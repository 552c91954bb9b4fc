"""Pictures of noise scales by layer, over a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from trainc.runtime.noise_scale.figures import Clause
from trainc.runtime.report.axes import along_run, arrows, decades
from trainc.runtime.report.run_records import RunRecords, without_loss

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
    _name_rows(axes, names)
    along_run(axes, runs, margin=0.0)
    assert axes.figure is not None
    bar = axes.figure.colorbar(mesh, ax=axes, pad=0.01, aspect=30, extend="both", extendfrac=0.02)
    bar.set_label(clause.unit, fontsize=9)
    # A number takes a fifth of an inch with the space around it.
    decades(bar.ax.yaxis, low, high, most=int((map_height(len(names)) - 1) / 0.2))
    if any(math.isnan(value) for row in values for value in row):
        missing = [Patch(facecolor=MISSING, label="undetermined")]
        axes.legend(handles=missing, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2)


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    every = math.ceil(len(names) / NAMED)
    axes.set_yticks(range(0, len(names), every), names[::every])
    axes.tick_params(axis="y", length=2, labelsize=8 if len(names) <= 24 else 6)


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


def has_intervals(run: RunRecords, label: str) -> bool:
    """Say whether a run ever knew an end of the interval of a single layer."""
    return _last(run, label) is not None


def _last(run: RunRecords, label: str) -> Mapping[str, Mapping[str, float]] | None:
    """Return the last figures by layer with an end of an interval among them; None where there are none."""
    for record in reversed(run.records):
        series: Mapping[str, Mapping[str, float]] = record.get("series", {})
        ends = [series.get(f"{label}.{end}", {}).values() for end in ("low", "high")]
        if any(0 < value < math.inf for values in ends for value in values):
            return series
    return None


def draw_end(axes: Axes, run: RunRecords, clause: Clause) -> None:
    """Draw the last noise scale of every layer with its interval, in the rows of the heat map."""
    series = _last(run, clause.label)
    assert series is not None
    names = list(series[clause.label])
    rows = range(len(names))
    scale, low, high = (
        [series[f"{clause.label}{part}"].get(name, math.nan) for name in names]
        for part in ("", ".low", ".high")
    )
    axes.plot(scale, rows, "o", color=run.color, markersize=4, label="_scale")
    ends = [(v, i) for part in (low, high) for i, v in enumerate(part) if 0 < v < math.inf]
    at, of = [v for v, _ in ends], [i for _, i in ends]
    axes.plot(at, of, "|", color=run.color, markersize=7, label="_known ends")
    for row in rows:
        known = [v for v in (low[row], scale[row], high[row]) if 0 < v < math.inf]
        if not known:
            continue
        axes.plot(
            [min(known), max(known)], [row, row], color=run.color, linewidth=1.2, label="_interval"
        )
        if low[row] == 0:
            arrows(axes, [min(known)], [row], "left", run.color, names[row])
        if high[row] == math.inf:
            arrows(axes, [max(known)], [row], "right", run.color, names[row])
    axes.set_xscale("log")
    axes.set_ylim(len(names) - 0.5, -0.5)
    _name_rows(axes, names)
    axes.set_xlabel(
        clause.unit if clause.level is None else f"{clause.unit}, {clause.level:.0%} interval"
    )
    decades(axes.xaxis, *axes.get_xlim())
