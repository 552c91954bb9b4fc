"""Pictures of noise scales: their course beside the batch size, layer by layer, and what calibration found."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainc.runtime.noise_scale import figures
from trainc.runtime.noise_scale.figures import Clause, Course
from trainc.runtime.report.axes import (
    BROKEN,
    SPACING,
    along_run,
    arrow,
    arrows,
    curve,
    decades,
    hatch,
    legend_below,
    mark,
    spaced,
)
from trainc.runtime.report.calibration_plot import draw_calibration
from trainc.runtime.report.layer_map import (
    draw_end,
    draw_layers,
    has_intervals,
    layer_rows,
    map_height,
)
from trainc.runtime.report.panel import Panel
from trainc.runtime.report.run_records import RunRecords, without_loss
from trainc.runtime.storage.jsonl import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TOTAL, BATCH, HATCH = "#D55E00", "#333333", "#8a8a8a"
BEYOND = 3.0
"""How many times as high or low as the curves an interval may make the panel."""


def noise_panels(runs: Sequence[RunRecords]) -> list[Panel]:
    """Return the panels of all noise scale clauses: course of each, calibration and layers of each run."""
    panels: list[Panel] = []
    for label in dict.fromkeys(clause.label for run in runs for clause in run.scales):
        measured = [(run, c) for run in runs for c in run.scales if c.label == label]
        draw = _with(draw_course, measured, runs)
        panels.append(Panel(f"Noise scale {label} and batch size", draw, height=3.7))
        for run, clause in measured:
            panels += _panels_of_run(run, clause, runs)
    return panels


def _panels_of_run(run: RunRecords, clause: Clause, runs: Sequence[RunRecords]) -> list[Panel]:
    panels: list[Panel] = []
    of = f", {run.name}" if len(runs) > 1 else ""
    if figures.points(run.records, clause.label, run.counter):
        title = f"Whole model against {clause.label}{of}"
        panels.append(Panel(title, _with(draw_calibration, run, clause, TOTAL)))
    if (rows := layer_rows(run, clause.label)) > 1:
        name, height = f"Noise scale {clause.label} by layer", map_height(rows)
        panels.append(Panel(name + of, _with(draw_layers, run, clause, runs), height, wide=True))
        if has_intervals(run, clause.label):
            title = f"{name} at the end{of}"
            panels.append(Panel(title, _with(draw_end, run, clause), height, wide=True))
    return panels


def _with(draw: Callable[..., None], *what: Any) -> Callable[[Axes], None]:
    return lambda axes: draw(axes, *what)


@dataclass(frozen=True, slots=True)
class _Drawn:
    """A course, its colour, and what its curve is called."""

    course: Course
    color: str
    label: str


def draw_course(
    axes: Axes, measured: Sequence[tuple[RunRecords, Clause]], runs: Sequence[RunRecords]
) -> None:
    """Draw a clause's noise scale with its interval and the batch size; of one run also the whole model's."""
    alone = len(runs) == 1
    drawn: list[_Drawn] = []
    sizes: list[float] = []
    for run, clause in measured:
        prefix = "" if alone else f"{run.name} "
        sizes += _batch(axes, run, BATCH if alone else run.color, f"{prefix}batch size")
        drawn.append(_Drawn(course_of(run, clause.label), run.color, f"{prefix}{clause.label}"))
        hatched = drawn[-1].course.undetermined()
        hatch(axes, hatched, HATCH if alone else run.color, f"{prefix}undetermined")
        color, label = BROKEN if alone else run.color, f"{prefix}loss or gradient not finite"
        mark(axes, run.stretches(_broken_by(clause.label, run.records)), color, label)
        if alone and run.has(f"{clause.label}.total"):
            total = course_of(run, clause.label, total=True)
            drawn.append(_Drawn(total, TOTAL, "whole model, by calibration"))
            sizes += _measured_totals(axes, run, clause)
    for one in drawn:
        curve(
            axes, one.course.at, one.course.scale, color=one.color, linewidth=1.4, label=one.label
        )
    along_run(axes, runs)
    axes.set_yscale("log")
    axes.set_ylim(*_limits([one.course for one in drawn], sizes))
    decades(axes.yaxis, *axes.get_ylim())
    units = {clause.unit for _, clause in measured}
    axes.set_ylabel("samples" if units == {"samples"} else "documents; batch size in samples")
    _intervals(axes, drawn, {clause.level for _, clause in measured if clause.level is not None})


def course_of(run: RunRecords, label: str, total: bool = False) -> Course:
    """Return a noise scale's course with a gap where a step was skipped: nothing was measured there."""
    gap: Record = {label: math.nan, f"{label}.total": math.nan}
    records = [gap | r if without_loss(r) else r for r in run.records]
    return figures.course(records, label, run.counter, total)


def _broken_by(label: str, records: Sequence[Record]) -> Callable[[Record], bool]:
    """Return what says whether a step's loss or gradient was not finite.

    Not every run records the gradient's norm; of gradients that are not finite there is no estimate either, which
    tells once there was one.
    """
    known = [r["step"] for r in records if math.isfinite(r.get(f"{label}.signal", math.nan))]
    first = min(known, default=math.inf)

    def broken(record: Record) -> bool:
        lost = record["step"] > first and math.isnan(record.get(f"{label}.signal", 0.0))
        return lost or without_loss(record) or not math.isfinite(record.get("gradient_norm", 0.0))

    return broken


def _batch(axes: Axes, run: RunRecords, color: str, label: str) -> list[float]:
    """Draw and return the batch size of every step, which reaches back to the step before."""
    steps = [record for record in run.records if run.counter in record and "batch" in record]
    at, sizes = [r[run.counter] for r in steps], [float(r["batch"]) for r in steps]
    begun = ([0.0, *at], sizes[:1] + sizes)
    axes.plot(*begun, "--", drawstyle="steps-pre", linewidth=1.1, color=color, label=label)
    return sizes


def _measured_totals(axes: Axes, run: RunRecords, clause: Clause) -> list[float]:
    """Draw and return what calibrations measured of the whole model, beside what is predicted from them."""
    found = figures.points(run.records, clause.label, run.counter)
    totals = [total for _, _, total in found]
    axes.plot(
        [at for at, _, _ in found],
        totals,
        linestyle="none",
        marker="o",
        markersize=3.5,
        markerfacecolor="white",
        markeredgewidth=0.9,
        color=TOTAL,
        label="whole model, measured",
    )
    return totals


def _limits(courses: Sequence[Course], sizes: Sequence[float]) -> tuple[float, float]:
    """Return the ends of the log axis: those of all curves, and of intervals as far as they are near.

    Where a scale is undetermined the bound that is known stands for it; the first steps know next to nothing, so a
    tenth of these may leave the picture.
    """
    rows = [row for c in courses for row in zip(c.scale, c.low, c.high, strict=True)]
    ends = [end for _, *both in rows for end in both if 0 < end < math.inf]
    lone = sorted(
        end
        for scale, *both in rows
        if not math.isfinite(scale)
        for end in both
        if 0 < end < math.inf
    )
    curves = [v for v in (*sizes, *(scale for scale, _, _ in rows)) if 0 < v < math.inf]
    curves += lone[len(lone) // 10 : len(lone) - len(lone) // 10]
    if not curves:
        return 0.1, 10.0
    low, high = min(curves), max(curves)
    low = max(min([low, *ends]), low / BEYOND)
    high = min(max([high, *ends]), high * BEYOND)
    return low / 1.5, high * 1.5


def _intervals(axes: Axes, drawn: Sequence[_Drawn], levels: set[float]) -> None:
    """Draw the intervals, and the legend with one entry for them in the colours they have."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    bands = [one for one in drawn if _band(axes, one)]
    open_ones = [one for one in drawn if _open_ends(axes, one)]
    more: list[tuple[Any, str]] = []
    if bands:
        swatches = tuple(Patch(facecolor=one.color, alpha=0.3) for one in bands)
        text = f"{levels.copy().pop():.0%} interval" if len(levels) == 1 else "interval"
        more.append((swatches, text))
    if open_ones:
        marks = tuple(
            Line2D([], [], linestyle="none", marker=arrow("up"), markeredgewidth=0, color=one.color)
            for one in open_ones
        )
        more.append((marks, "interval without a bound"))
    legend_below(axes, *more)


def _band(axes: Axes, one: _Drawn) -> bool:
    """Fill an interval between its ends, or from the end that is known to the curve; say whether there is any."""
    course = one.course
    rows = list(zip(course.low, course.scale, course.high, strict=True))
    if not any(course.bounded):
        return False
    low = [low if low > 0 else _or(scale, high) for low, scale, high in rows]
    high = [high if high < math.inf else _or(scale, low) for low, scale, high in rows]
    axes.fill_between(
        course.at, low, high, where=course.bounded, color=one.color, alpha=0.18, linewidth=0
    )
    for end, values in (("low", course.low), ("high", course.high)):
        known = [value if 0 < value < math.inf else math.nan for value in values]
        label = f"_{one.label} {end}"
        axes.plot(course.at, known, color=one.color, alpha=0.4, linewidth=0.6, label=label)
    return True


def _or(scale: float, bound: float) -> float:
    return scale if math.isfinite(scale) else bound


def _open_ends(axes: Axes, one: _Drawn) -> bool:
    """Draw arrows where nothing bounds an interval, from the curve or the end that is known; say whether any."""
    course = one.course
    left, right = axes.get_xlim()
    found = False
    for up, ends, others in ((True, course.high, course.low), (False, course.low, course.high)):
        base = [_or(scale, other) for scale, other in zip(course.scale, others, strict=True)]
        unbounded = [
            (end == math.inf if up else end == 0) and 0 < start < math.inf
            for end, start in zip(ends, base, strict=True)
        ]
        shown = list(spaced(course.at, unbounded, SPACING * (right - left)))
        if shown:
            at, values = [course.at[i] for i in shown], [base[i] for i in shown]
            arrows(axes, at, values, "up" if up else "down", one.color, one.label)
            found = True
    return found
