"""The panels of noise scales: over the run with the batch size, by layer, and the calibration."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from matplotlib.axes import Axes

from trainc.runtime.noise_scale.history import NoiseScaleClause, calibration_points
from trainc.runtime.noise_scale.pictures.calibration import draw_calibration
from trainc.runtime.report.axes import (
    NON_FINITE,
    Panel,
    curve,
    hatch,
    log_ticks,
    set_run_axis,
    shade,
)
from trainc.runtime.report.interval_curves import (
    Drawn,
    History,
    draw_intervals,
    read_history,
    value_limits,
)
from trainc.runtime.report.layer_map import (
    count_layers,
    draw_last_intervals,
    draw_layers,
    last_with_bounds,
    map_height,
)
from trainc.runtime.report.run_records import RecordedClause, RunRecords, has_non_finite_loss
from trainc.runtime.storage.jsonl import Record

WHOLE_MODEL, BATCH, HATCH = "#D55E00", "#333333", "#8a8a8a"
BY_LAYER = ("", ".signal", ".noise", ".low", ".high")
"""What a clause records by layer, behind its label."""


def noise_panels(clauses: Sequence[RecordedClause], runs: Sequence[RunRecords]) -> Iterator[Panel]:
    """Yield the panels of the clauses of one label: over the run, then calibration and layers of each run."""
    label = clauses[0].label
    measured = [
        (c.run, NoiseScaleClause(label, c.construct.unit_of(""), c.construct.level))
        for c in clauses
        if c.run.has(label)
    ]
    if not measured:
        return
    draw = partial(draw_history, measured=measured, runs=runs)
    covered = tuple(f"{label}{part}" for part in BY_LAYER)
    yield Panel(f"Noise scale {label} and batch size", draw, height=3.7, covers=covered)
    for run, clause in measured:
        yield from _panels_of_run(run, clause, runs)


def _panels_of_run(
    run: RunRecords, clause: NoiseScaleClause, runs: Sequence[RunRecords]
) -> Iterator[Panel]:
    label, of = clause.label, f", {run.name}" if len(runs) > 1 else ""
    if calibration_points(run.records, label, run.counter):
        title = f"Noise scale of the whole model over {label}{of}"
        yield Panel(title, partial(draw_calibration, run=run, clause=clause, color=WHOLE_MODEL))
    if (rows := count_layers(run, label)) > 1:
        name, height = f"Noise scale {label} by layer", map_height(rows)
        draw = partial(draw_layers, run=run, quantity=label, unit=clause.unit, runs=runs)
        yield Panel(name + of, draw, height, wide=True)
        ends = (f"{label}.low", f"{label}.high")
        if series := last_with_bounds(run, ends):
            text = f"{clause.unit}, {clause.level:.0%} interval"
            draw = partial(draw_last_intervals, color=run.color, quantity=label, ends=ends)
            draw = partial(draw, series=series, text=text)
            yield Panel(f"{name} at the end{of}", draw, height, wide=True)


def draw_history(
    axes: Axes, measured: Sequence[tuple[RunRecords, NoiseScaleClause]], runs: Sequence[RunRecords]
) -> None:
    """Draw a clause's noise scale with its interval and the batch size; for a single run also the whole model's."""
    single = len(runs) == 1
    drawn: list[Drawn] = []
    sizes: list[float] = []
    for run, clause in measured:
        prefix = "" if single else f"{run.name} "
        sizes += _draw_batch(axes, run, BATCH if single else run.color, f"{prefix}batch size")
        drawn.append(Drawn(history_of(run, clause.label), run.color, f"{prefix}{clause.label}"))
        hatched = drawn[-1].history.undetermined()
        hatch(axes, hatched, HATCH if single else run.color, f"{prefix}undetermined")
        color, label = NON_FINITE if single else run.color, f"{prefix}loss or gradient not finite"
        shade(axes, run.intervals_where(_non_finite(clause.label, run.records)), color, label)
        if single and run.has(f"{clause.label}.total"):
            total = history_of(run, clause.label, whole_model=True)
            drawn.append(Drawn(total, WHOLE_MODEL, "whole model, by calibration"))
            sizes += _draw_calibrations(axes, run, clause)
    for one in drawn:
        at, values = one.history.positions, one.history.values
        curve(axes, at, values, color=one.color, linewidth=1.4, label=one.label)
    set_run_axis(axes, runs)
    axes.set_yscale("log")
    axes.set_ylim(*value_limits([one.history for one in drawn], sizes))
    log_ticks(axes.yaxis, *axes.get_ylim())
    units = {clause.unit for _, clause in measured}
    axes.set_ylabel("samples" if units == {"samples"} else "documents; batch size in samples")
    draw_intervals(axes, drawn, {clause.level for _, clause in measured})


def history_of(run: RunRecords, label: str, whole_model: bool = False) -> History:
    """Return a noise scale over the run, with a gap where a step was skipped for its loss."""
    gap: Record = {label: math.nan, f"{label}.total": math.nan}
    records = [gap | r if has_non_finite_loss(r) else r for r in run.records]
    name, joint = (f"{label}.total", "_") if whole_model else (label, ".")
    return read_history(records, name, (f"{name}{joint}low", f"{name}{joint}high"), run.counter)


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
