"""Panels of the signals of clauses in the general form: a curve a run, with the interval where it has one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from matplotlib.axes import Axes

from trainc.runtime.report.axes import Panel, curve, log_ticks, set_run_axis
from trainc.runtime.report.interval_curves import (
    Drawn,
    draw_intervals,
    read_history,
    value_limits,
)
from trainc.runtime.report.run_records import RecordedClause, RunRecords
from trainc.runtime.report.shown_signal import ShownSignal


def signal_panels(clauses: Sequence[RecordedClause], runs: Sequence[RunRecords]) -> Iterator[Panel]:
    """Yield a panel for each shown signal of the clauses of one label that a run recorded."""
    signals = {signal.name: signal for clause in clauses for signal in clause.signals}
    for name, signal in signals.items():
        if measured := [clause.run for clause in clauses if clause.run.has(name)]:
            draw = partial(_draw_signal, signal=signal, measured=measured, runs=runs)
            yield Panel(signal.title, draw)


def _draw_signal(
    axes: Axes, signal: ShownSignal, measured: Sequence[RunRecords], runs: Sequence[RunRecords]
) -> None:
    drawn = [
        Drawn(
            read_history(run.placed, signal.name, signal.ends, run.counter),
            run.color,
            signal.title if len(runs) == 1 else run.name,
        )
        for run in measured
    ]
    for one in drawn:
        at, values = one.history.positions, one.history.values
        curve(axes, at, values, color=one.color, linewidth=1.4, label=one.label)
    set_run_axis(axes, runs)
    if signal.logarithmic:
        axes.set_yscale("log")
        axes.set_ylim(*value_limits([one.history for one in drawn], ()))
        log_ticks(axes.yaxis, *axes.get_ylim())
    else:
        axes.ticklabel_format(axis="y", useOffset=False)
    axes.set_ylabel(signal.unit or "")
    if signal.ends is not None:
        draw_intervals(axes, drawn, set())
