"""Pictures of noise scales: their course beside the batch size, layer by layer, and what calibration found."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from trainc.runtime import noise_figures
from trainc.runtime.noise_figures import Clause, Course
from trainc.runtime.records import Panel, RunRecords

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TOTAL, BATCH, HATCH, MISSING = "#D55E00", "#333333", "#8a8a8a", "#c4c4c4"
COLUMNS = 400
"""How many columns of a heat map can be told apart."""
NAMED = 110
"""How many layers of a heat map can be named."""


def noise_panels(runs: Sequence[RunRecords]) -> list[Panel]:
    """Return the panels of all noise scale clauses: course of each, calibration and layers of each run."""
    panels: list[Panel] = []
    for label in dict.fromkeys(clause.label for run in runs for clause in run.scales):
        measured = [(run, c) for run in runs for c in run.scales if c.label == label]
        panels.append(Panel(f"Noise scale {label} and batch size", _with(draw_course, measured)))
        for run, clause in measured:
            panels += _panels_of_run(run, clause, f", {run.name}" if len(runs) > 1 else "")
    return panels


def _panels_of_run(run: RunRecords, clause: Clause, of: str) -> list[Panel]:
    panels: list[Panel] = []
    if noise_figures.points(run.records, clause.label, run.counter):
        title = f"Whole model against {clause.label}{of}"
        panels.append(Panel(title, _with(draw_calibration, run, clause)))
    rows = max((len(r.get("series", {}).get(clause.label, ())) for r in run.records), default=0)
    if rows > 1:
        height = 1.1 + 0.2 * min(rows, 24) + 0.09 * min(max(rows - 24, 0), NAMED - 24)
        title = f"Noise scale {clause.label} by layer{of}"
        panels.append(Panel(title, _with(draw_layers, run, clause), height, wide=True))
    return panels


def _with(draw: Callable[..., None], *what: Any) -> Callable[[Axes], None]:
    return lambda axes: draw(axes, *what)


# the course


def draw_course(axes: Axes, measured: Sequence[tuple[RunRecords, Clause]]) -> None:
    """Draw a clause's noise scale with its interval and the batch size; of one run also the whole model's."""
    alone = len(measured) == 1
    drawn: list[tuple[Course, str]] = []
    sizes: list[float] = []
    for run, clause in measured:
        prefix = "" if alone else f"{run.name} "
        sizes += _batch(axes, run, BATCH if alone else run.color, f"{prefix}batch size")
        course = noise_figures.course(run.records, clause.label, run.counter)
        _line(axes, course, run.color, f"{prefix}{clause.label}")
        _shade(axes, course, HATCH if alone else run.color, f"{prefix}undetermined")
        drawn.append((course, run.color))
        if alone and run.has(f"{clause.label}.total"):
            total = noise_figures.course(run.records, clause.label, run.counter, total=True)
            known = "" if any(total.bounded) else ", no interval"
            _line(axes, total, TOTAL, f"whole model, by calibration{known}")
            drawn.append((total, TOTAL))
    limits = _limits([course for course, _ in drawn], sizes)
    for course, color in drawn:
        _band(axes, course, color, limits)
    axes.set_yscale("log")
    axes.set_ylim(*limits)
    _finish(axes, measured, any(any(course.bounded) for course, _ in drawn))


def _line(axes: Axes, course: Course, color: str, label: str) -> None:
    axes.plot(course.at, course.scale, color=color, linewidth=1.4, label=label)


def _batch(axes: Axes, run: RunRecords, color: str, label: str) -> list[float]:
    """Draw and return the batch size of every step, which reaches back to the step before."""
    steps = [record for record in run.records if "batch" in record]
    at, sizes = [r[run.counter] for r in steps], [float(r["batch"]) for r in steps]
    axes.plot(at, sizes, "--", drawstyle="steps-pre", linewidth=1.1, color=color, label=label)
    return sizes


def _shade(axes: Axes, course: Course, color: str, label: str) -> None:
    """Hatch where there was no noise scale."""
    for index, (begin, end) in enumerate(course.undetermined()):
        named = "_" * bool(index) + label  # a leading underscore keeps it out of the legend
        axes.axvspan(
            begin, end, facecolor="none", edgecolor=color, hatch="////", linewidth=0, label=named
        )


def _limits(courses: Sequence[Course], sizes: Sequence[float]) -> tuple[float, float]:
    """Return the ends of the log axis: all scales and batch sizes with a margin, and most of the intervals."""
    scales = [scale for course in courses for scale in course.scale]
    inside = [v for v in (*scales, *sizes) if 0 < v < math.inf]
    # The first steps know next to nothing: their intervals may leave the picture.
    lows = sorted(v for course in courses for v in course.low if 0 < v < math.inf)
    highs = sorted(v for course in courses for v in course.high if 0 < v < math.inf)
    inside += lows[len(lows) // 10 :][:1] + highs[: math.ceil(0.9 * len(highs))][-1:]
    return (min(inside) / 1.5, max(inside) * 1.5) if inside else (0.1, 10.0)


def _band(axes: Axes, course: Course, color: str, limits: tuple[float, float]) -> None:
    """Fill the intervals that say something; an end that nothing bounds is the picture's."""
    if any(course.bounded):
        low = [max(value, limits[0]) for value in course.low]
        high = [min(value, limits[1]) for value in course.high]
        axes.fill_between(
            course.at, low, high, where=course.bounded, color=color, alpha=0.18, linewidth=0
        )


def _finish(axes: Axes, measured: Sequence[tuple[RunRecords, Clause]], bounded: bool) -> None:
    """Label the axes, and put the legend below them: a course may be anywhere inside."""
    _count(axes, measured[0][0].counter)
    units = {clause.unit for _, clause in measured}
    axes.set_ylabel("samples" if units == {"samples"} else "documents; batch size in samples")
    _decades(axes, *axes.get_ylim())
    levels = {clause.level for _, clause in measured if clause.level is not None}
    if bounded:
        text = f"{levels.pop():.0%} interval" if len(levels) == 1 else "interval"
        axes.fill_between([], [], [], color="#888888", alpha=0.3, label=text)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3, borderaxespad=0)


def _count(axes: Axes, counter: str) -> None:
    """Label the horizontal axis, with SI prefixes."""
    from matplotlib.ticker import EngFormatter

    axes.set_xlabel(counter)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _decades(axes: Axes, low: float, high: float) -> None:
    """Mark a vertical log axis with plain numbers: 1, 2, 5 of a decade where there are few."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    few = high / low < 1e4
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if few else (1.0,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.minorticks_off()


# layers


def draw_layers(axes: Axes, run: RunRecords, clause: Clause) -> None:
    """Draw layers over the run as a heat map, in the order of the model from top to bottom."""
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Patch

    names, edges, values = heat(run, clause.label)
    low, high = _common(values)
    colors = colormaps["viridis"].with_extremes(bad=MISSING)
    # One value alone would leave the scale of colours without a width.
    norm = LogNorm(low, high if high > low else 1.01 * low)
    rows = [index - 0.5 for index in range(len(names) + 1)]
    mesh = axes.pcolormesh(edges, rows, values, norm=norm, cmap=colors, rasterized=True)
    axes.invert_yaxis()
    axes.grid(False)
    every = math.ceil(len(names) / NAMED)
    axes.set_yticks(range(0, len(names), every), names[::every])
    axes.tick_params(axis="y", length=2, labelsize=8 if len(names) <= 24 else 6)
    _count(axes, run.counter)
    bar = axes.figure.colorbar(mesh, ax=axes, pad=0.01, aspect=30, extend="both", extendfrac=0.02)
    bar.set_label(f"noise scale, {clause.unit}", fontsize=9)
    _decades(bar.ax, low, high)
    if any(math.isnan(value) for row in values for value in row):
        missing = [Patch(facecolor=MISSING, label="undetermined")]
        axes.legend(handles=missing, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2)


def heat(run: RunRecords, label: str) -> tuple[list[str], list[float], list[list[float]]]:
    """Return layers, edges of the columns (columns + 1) and values (layers, columns); NaN is undetermined.

    Of a long run a column is several steps, with the last one's value: that is an average over steps already.
    """
    measured = [r for r in run.records if label in r.get("series", {})]
    first = run.records.index(measured[0])
    before = [r[run.counter] for r in run.records[:first] if run.counter in r]
    size = math.ceil(len(measured) / COLUMNS)
    shown = measured[size - 1 :: size]
    if len(measured) % size:
        shown.append(measured[-1])
    names = list(measured[-1]["series"][label])
    edges = [before[-1] if before else 0, *(record[run.counter] for record in shown)]
    values = [[r["series"][label].get(name, math.nan) for r in shown] for name in names]
    return names, edges, values


def _common(values: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Return the ends of the scale of colours: one value in a hundred may lie beyond each."""
    finite = sorted(v for row in values for v in row if math.isfinite(v) and v > 0)
    if not finite:
        return 0.5, 2.0
    return finite[len(finite) // 100], finite[-1 - len(finite) // 100]


# calibration


def draw_calibration(axes: Axes, run: RunRecords, clause: Clause) -> None:
    """Draw the whole model's noise scale against that of the clause's layers, with the fitted line."""
    from matplotlib.ticker import EngFormatter

    found = noise_figures.points(run.records, clause.label, run.counter)
    at, norms, total = (list(column) for column in zip(*found, strict=True))
    end = 1.05 * max(norms)
    slope, low, high = (
        noise_figures.last(run.records, f"{clause.label}.{name}")
        for name in ("slope", "slope_low", "slope_high")
    )
    if math.isfinite(slope):
        axes.plot(
            [0, end],
            [0, slope * end],
            color=TOTAL,
            linewidth=1.3,
            label=f"{slope:.3g} times",
            zorder=1,
        )
    if math.isfinite(low) and math.isfinite(high):
        text = "interval" if clause.level is None else f"{clause.level:.0%} interval"
        label = f"{text}, {low:.3g} to {high:.3g}"
        axes.fill_between(
            [0, end],
            [0, low * end],
            [0, high * end],
            color=TOTAL,
            alpha=0.15,
            linewidth=0,
            label=label,
        )
    dots = axes.scatter(norms, total, c=at, cmap="viridis", s=16, label="calibrations", zorder=2)
    axes.figure.colorbar(dots, ax=axes, pad=0.01, format=EngFormatter(sep="")).set_label(
        run.counter, fontsize=9
    )
    axes.set_xlim(0, end)
    axes.set_ylim(0, 1.05 * max(*total, slope * end if math.isfinite(slope) else 0))
    axes.set_xlabel(f"noise scale of the measured layers, {clause.unit}")
    axes.set_ylabel(f"of all layers, {clause.unit}")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3, borderaxespad=0)
