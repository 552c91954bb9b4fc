"""The panels of noise scales: over the run with the batch size, by layer, and the calibration."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from trainc.runtime.noise_scale.history import (
    History,
    NoiseScaleClause,
    calibration_points,
    read_history,
)
from trainc.runtime.report.axes import (
    NON_FINITE,
    SPACING,
    Panel,
    arrow_marker,
    arrows,
    curve,
    hatch,
    legend_below,
    log_ticks,
    set_run_axis,
    shade,
    spaced_indices,
)
from trainc.runtime.report.calibration_plot import draw_calibration
from trainc.runtime.report.layer_map import (
    count_layers,
    draw_last_intervals,
    draw_layers,
    last_with_bounds,
    map_height,
)
from trainc.runtime.report.run_records import RunRecords, has_non_finite_loss
from trainc.runtime.storage.jsonl import Record

WHOLE_MODEL, BATCH, HATCH = "#D55E00", "#333333", "#8a8a8a"
BEYOND = 3.0
"""An interval may extend the axis to this many times the range of the curves."""


def noise_panels(runs: Sequence[RunRecords]) -> list[Panel]:
    """Return the panels of all noise scale clauses: each over the run, with calibration and layers of each run."""
    panels: list[Panel] = []
    for label in dict.fromkeys(clause.label for run in runs for clause in run.noise_scales):
        measured = [(run, c) for run in runs for c in run.noise_scales if c.label == label]
        draw = partial(draw_history, measured=measured, runs=runs)
        panels.append(Panel(f"Noise scale {label} and batch size", draw, height=3.7))
        for run, clause in measured:
            panels += _panels_of_run(run, clause, runs)
    return panels


def _panels_of_run(
    run: RunRecords, clause: NoiseScaleClause, runs: Sequence[RunRecords]
) -> list[Panel]:
    panels: list[Panel] = []
    of = f", {run.name}" if len(runs) > 1 else ""
    if calibration_points(run.records, clause.label, run.counter):
        title = f"Noise scale of the whole model over {clause.label}{of}"
        draw = partial(draw_calibration, run=run, clause=clause, color=WHOLE_MODEL)
        panels.append(Panel(title, draw))
    if (rows := count_layers(run, clause.label)) > 1:
        name, height = f"Noise scale {clause.label} by layer", map_height(rows)
        draw = partial(draw_layers, run=run, clause=clause, runs=runs)
        panels.append(Panel(name + of, draw, height, wide=True))
        if series := last_with_bounds(run, clause.label):
            draw = partial(draw_last_intervals, color=run.color, clause=clause, series=series)
            panels.append(Panel(f"{name} at the end{of}", draw, height, wide=True))
    return panels


@dataclass(frozen=True, slots=True)
class _Drawn:
    """A curve: its values, its colour and its label."""

    history: History
    color: str
    label: str


def draw_history(
    axes: Axes, measured: Sequence[tuple[RunRecords, NoiseScaleClause]], runs: Sequence[RunRecords]
) -> None:
    """Draw a clause's noise scale with its interval and the batch size; for a single run also the whole model's."""
    single = len(runs) == 1
    drawn: list[_Drawn] = []
    sizes: list[float] = []
    for run, clause in measured:
        prefix = "" if single else f"{run.name} "
        sizes += _draw_batch(axes, run, BATCH if single else run.color, f"{prefix}batch size")
        drawn.append(_Drawn(history_of(run, clause.label), run.color, f"{prefix}{clause.label}"))
        hatched = drawn[-1].history.undetermined()
        hatch(axes, hatched, HATCH if single else run.color, f"{prefix}undetermined")
        color, label = NON_FINITE if single else run.color, f"{prefix}loss or gradient not finite"
        shade(axes, run.intervals_where(_non_finite(clause.label, run.records)), color, label)
        if single and run.has(f"{clause.label}.total"):
            total = history_of(run, clause.label, whole_model=True)
            drawn.append(_Drawn(total, WHOLE_MODEL, "whole model, by calibration"))
            sizes += _draw_calibrations(axes, run, clause)
    for one in drawn:
        at, values = one.history.positions, one.history.noise_scale
        curve(axes, at, values, color=one.color, linewidth=1.4, label=one.label)
    set_run_axis(axes, runs)
    axes.set_yscale("log")
    axes.set_ylim(*_limits([one.history for one in drawn], sizes))
    log_ticks(axes.yaxis, *axes.get_ylim())
    units = {clause.unit for _, clause in measured}
    axes.set_ylabel("samples" if units == {"samples"} else "documents; batch size in samples")
    _draw_intervals(
        axes, drawn, {clause.level for _, clause in measured if clause.level is not None}
    )


def history_of(run: RunRecords, label: str, whole_model: bool = False) -> History:
    """Return a noise scale over the run, with a gap where a step was skipped for its loss."""
    gap: Record = {label: math.nan, f"{label}.total": math.nan}
    records = [gap | r if has_non_finite_loss(r) else r for r in run.records]
    return read_history(records, label, run.counter, whole_model)


def _non_finite(label: str, records: Sequence[Record]) -> Callable[[Record], bool]:
    """Return a function that says whether a step's loss or gradient is not finite.

    Not every run records the gradient's norm. After the first estimate, a step without one has a non-finite gradient.
    """
    known = [r["step"] for r in records if math.isfinite(r.get(f"{label}.signal", math.nan))]
    first = min(known, default=math.inf)

    def non_finite(record: Record) -> bool:
        no_estimate = record["step"] > first and math.isnan(record.get(f"{label}.signal", 0.0))
        return (
            no_estimate
            or has_non_finite_loss(record)
            or not math.isfinite(record.get("gradient_norm", 0.0))
        )

    return non_finite


def _draw_batch(axes: Axes, run: RunRecords, color: str, label: str) -> list[float]:
    """Draw and return the batch size of every step."""
    steps = [record for record in run.records if run.counter in record and "batch" in record]
    at, sizes = [r[run.counter] for r in steps], [float(r["batch"]) for r in steps]
    steps_from_zero = ([0.0, *at], sizes[:1] + sizes)
    axes.plot(
        *steps_from_zero, "--", drawstyle="steps-pre", linewidth=1.1, color=color, label=label
    )
    return sizes


def _draw_calibrations(axes: Axes, run: RunRecords, clause: NoiseScaleClause) -> list[float]:
    """Draw and return the whole model's noise scales that calibrations measured."""
    found = calibration_points(run.records, clause.label, run.counter)
    totals = [total for _, _, total in found]
    axes.plot(
        [at for at, _, _ in found],
        totals,
        linestyle="none",
        marker="o",
        markersize=3.5,
        markerfacecolor="white",
        markeredgewidth=0.9,
        color=WHOLE_MODEL,
        label="whole model, measured",
    )
    return totals


def _limits(histories: Sequence[History], sizes: Sequence[float]) -> tuple[float, float]:
    """Return the ends of the logarithmic axis: those of all curves, and of intervals within `BEYOND` of them.

    Where a noise scale is undetermined its known bound counts instead; bounds of the first steps are far off, so a
    tenth of them may be outside.
    """
    rows = [row for h in histories for row in zip(h.noise_scale, h.low, h.high, strict=True)]
    ends = [end for _, *both in rows for end in both if 0 < end < math.inf]
    bounds = sorted(
        end
        for scale, *both in rows
        if not math.isfinite(scale)
        for end in both
        if 0 < end < math.inf
    )
    curves = [v for v in (*sizes, *(scale for scale, _, _ in rows)) if 0 < v < math.inf]
    curves += bounds[len(bounds) // 10 : len(bounds) - len(bounds) // 10]
    if not curves:
        return 0.1, 10.0
    low, high = min(curves), max(curves)
    low = max(min([low, *ends]), low / BEYOND)
    high = min(max([high, *ends]), high * BEYOND)
    return low / 1.5, high * 1.5


def _draw_intervals(axes: Axes, drawn: Sequence[_Drawn], levels: set[float]) -> None:
    """Draw the intervals, and the legend with one entry for all of them."""
    bands = [one for one in drawn if _draw_band(axes, one)]
    unbounded = [one for one in drawn if _draw_unbounded(axes, one)]
    more: list[tuple[Any, str]] = []
    if bands:
        swatches = tuple(Patch(facecolor=one.color, alpha=0.3) for one in bands)
        text = f"{levels.copy().pop():.0%} interval" if len(levels) == 1 else "interval"
        more.append((swatches, text))
    if unbounded:
        arrow: dict[str, Any] = {"linestyle": "none", "marker": arrow_marker("up")}
        marks = tuple(
            Line2D([], [], markeredgewidth=0, color=one.color, **arrow) for one in unbounded
        )
        more.append((marks, "interval without a bound"))
    legend_below(axes, *more)


def _draw_band(axes: Axes, one: _Drawn) -> bool:
    """Fill an interval between its ends, or between the known end and the curve; return whether there is any."""
    history = one.history
    rows = list(zip(history.low, history.noise_scale, history.high, strict=True))
    if not any(history.bounded):
        return False
    low = [low if low > 0 else _or_bound(scale, high) for low, scale, high in rows]
    high = [high if high < math.inf else _or_bound(scale, low) for low, scale, high in rows]
    axes.fill_between(
        history.positions,
        low,
        high,
        where=history.bounded,
        color=one.color,
        alpha=0.18,
        linewidth=0,
    )
    for end, values in (("low", history.low), ("high", history.high)):
        known = [value if 0 < value < math.inf else math.nan for value in values]
        label = f"_{one.label} {end}"
        axes.plot(history.positions, known, color=one.color, alpha=0.4, linewidth=0.6, label=label)
    return True


def _or_bound(scale: float, bound: float) -> float:
    return scale if math.isfinite(scale) else bound


def _draw_unbounded(axes: Axes, one: _Drawn) -> bool:
    """Draw arrows where an interval has no bound, from the curve or the known end; return whether there are any."""
    history = one.history
    left, right = axes.get_xlim()
    drawn = False
    for up, ends, others in ((True, history.high, history.low), (False, history.low, history.high)):
        base = [
            _or_bound(scale, other)
            for scale, other in zip(history.noise_scale, others, strict=True)
        ]
        open_ends = [
            (end == math.inf if up else end == 0) and 0 < start < math.inf
            for end, start in zip(ends, base, strict=True)
        ]
        shown = list(spaced_indices(history.positions, open_ends, SPACING * (right - left)))
        if shown:
            at, values = [history.positions[i] for i in shown], [base[i] for i in shown]
            arrows(axes, at, values, "up" if up else "down", one.color, one.label)
            drawn = True
    return drawn
