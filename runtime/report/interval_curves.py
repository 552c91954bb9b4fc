"""Curves of measured numbers with their intervals, over runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from trainc.runtime.report.axes import SPACING, arrow_marker, arrows, legend_below, spaced_indices
from trainc.runtime.report.run_records import join_steps
from trainc.runtime.storage.jsonl import Record

BEYOND = 3.0
"""An interval may extend the axis to this many times the range of the curves."""


@dataclass(frozen=True, slots=True)
class History:
    """A measured number over a run; all lists have one entry for each step, NaN where nothing is known."""

    positions: list[float]
    values: list[float]
    low: list[float]
    high: list[float]

    @property
    def bounded(self) -> list[bool]:
        """Return for each step whether the interval has a bound: a low end above zero, or a finite high end."""
        return [low > 0 or high < math.inf for low, high in zip(self.low, self.high, strict=True)]

    def undetermined(self) -> list[tuple[float, float]]:
        """Return the intervals (from, to) where it was undetermined."""
        missing = (not math.isfinite(value) for value in self.values)
        return join_steps(zip(self.positions, missing, strict=True))


def read_history(
    records: Iterable[Record], name: str, ends: tuple[str, str] | None, counter: str
) -> History:
    """Return a quantity over `counter`, with the quantities that are the ends of its interval."""
    found = [record for record in records if name in record]
    positions, values = [r[counter] for r in found], [r[name] for r in found]
    lows, highs = ([r.get(end, math.nan) for r in found] for end in ends or ("", ""))
    return History(positions, values, lows, highs)


@dataclass(frozen=True, slots=True)
class Drawn:
    """A curve: its values, its colour and its label."""

    history: History
    color: str
    label: str


def value_limits(histories: Sequence[History], sizes: Sequence[float]) -> tuple[float, float]:
    """Return the ends of the logarithmic axis: those of all curves, and of intervals within `BEYOND` of them.

    Where a value is undetermined its known bound counts instead; bounds of the first steps are far off, so a tenth of
    them may be outside.
    """
    rows = [row for h in histories for row in zip(h.values, h.low, h.high, strict=True)]
    ends = [end for _, *both in rows for end in both if 0 < end < math.inf]
    bounds = sorted(
        end
        for value, *both in rows
        if not math.isfinite(value)
        for end in both
        if 0 < end < math.inf
    )
    curves = [v for v in (*sizes, *(value for value, _, _ in rows)) if 0 < v < math.inf]
    curves += bounds[len(bounds) // 10 : len(bounds) - len(bounds) // 10]
    if not curves:
        return 0.1, 10.0
    low, high = min(curves), max(curves)
    low = max(min([low, *ends]), low / BEYOND)
    high = min(max([high, *ends]), high * BEYOND)
    return low / 1.5, high * 1.5


def draw_intervals(axes: Axes, drawn: Sequence[Drawn], levels: set[float]) -> None:
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


def _draw_band(axes: Axes, one: Drawn) -> bool:
    """Fill an interval between its ends, or between the known end and the curve; return whether there is any."""
    history = one.history
    rows = list(zip(history.low, history.values, history.high, strict=True))
    if not any(history.bounded):
        return False
    low = [low if low > 0 else _or_bound(value, high) for low, value, high in rows]
    high = [high if high < math.inf else _or_bound(value, low) for low, value, high in rows]
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


def _or_bound(value: float, bound: float) -> float:
    return value if math.isfinite(value) else bound


def _draw_unbounded(axes: Axes, one: Drawn) -> bool:
    """Draw arrows where an interval has no bound, from the curve or the known end; return whether there are any."""
    history = one.history
    left, right = axes.get_xlim()
    drawn = False
    for up, ends, others in ((True, history.high, history.low), (False, history.low, history.high)):
        base = [
            _or_bound(value, other) for value, other in zip(history.values, others, strict=True)
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
