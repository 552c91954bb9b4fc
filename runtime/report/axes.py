"""Panels, and the parts that all kinds of panels use: axes, ticks, legends, and marks on curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from textwrap import wrap
from typing import Any, Literal

from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D
from matplotlib.transforms import ScaledTranslation

from trainc.runtime.report.run_records import RunRecords

Direction = Literal["up", "down", "left", "right"]
_ARROWS: dict[Direction, tuple[int, int]] = {
    "up": (0, 1),
    "down": (0, -1),
    "left": (-1, 0),
    "right": (1, 0),
}
NON_FINITE = "#B2182B"
"""The colour of steps with a non-finite loss or gradient, where one run is drawn."""
SPACING = 1 / 14
"""The distance between arrows on a curve, in widths of the panel."""


@dataclass(frozen=True, slots=True)
class Panel:
    """A title and the function that draws on its axes; `height` in inches, `wide`: over all columns.

    `covers` are the figures by layer that need no panel of their own, since this one and those after it show them.
    """

    title: str
    draw: Callable[[Axes], None]
    height: float = 3.3
    wide: bool = False
    covers: tuple[str, ...] = ()


def write(axes: Axes, text: str) -> None:
    """Write text in place of a picture."""
    axes.clear()
    axes.set_axis_off()
    axes.text(0.5, 0.5, "\n".join(wrap(text, 60)), ha="center", va="center", parse_math=False)


def set_run_axis(axes: Axes, runs: Sequence[RunRecords], margin: float = 0.01) -> None:
    """Set the horizontal axis to the runs' counter, from 0 to the end of the longest run, as in every panel."""
    end = max((at for run in runs for at in run.positions), default=0.0) or 1.0
    axes.set_xlim(-margin * end, (1 + margin) * end)
    axes.set_xlabel(runs[0].counter)
    integer_ticks(axes.xaxis)


def integer_ticks(axis: Axis, most: int | Literal["auto"] = "auto") -> None:
    """Set ticks at integers, at most `most`, with SI prefixes."""
    axis.set_major_locator(ticker.MaxNLocator(most, steps=[1, 2, 2.5, 5, 10], integer=True))
    axis.set_major_formatter(ticker.EngFormatter(sep=""))


def plain_numbers(axis: Axis) -> None:
    """Label ticks with plain numbers: an exponent at the end of the axis is overlooked, and moves the title."""
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:.4g}"))


def log_ticks(axis: Axis, low: float, high: float, most: int = 12) -> None:
    """Set at most `most` ticks with plain numbers on a logarithmic axis."""
    plain_numbers(axis)
    axis.set_major_locator(ticker.FixedLocator(round_numbers(low, high, most)))
    axis.set_minor_locator(ticker.NullLocator())
    axis.set_minor_formatter(ticker.NullFormatter())


def round_numbers(low: float, high: float, most: int) -> list[float]:
    """Return round numbers between two ends for a logarithmic axis: 1, 2, 5 of each decade, or at most `most`."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = [(1, (1, 2, 5)), (1, (1, 3)), *((every, (1,)) for every in range(1, last - first + 2))]
    for every, parts in steps:
        exponents = range(-(-first // every) * every, last + 1, every)
        found = [part * 10.0**n for n in exponents for part in parts]
        found = [value for value in found if low <= value <= high]
        if len(found) <= most:
            break
    if len(found) < 2:  # less than a decade
        ticks = ticker.MaxNLocator(3, steps=[1, 2, 5, 10]).tick_values(low, high)
        found = [float(tick) for tick in ticks if low <= tick <= high]
    return found


def legend_below(axes: Axes, *more: tuple[Any, str]) -> None:
    """Put the legend below the axes, where it hides no curve; `more` are further handles and their texts.

    A tuple of handles is shown side by side.
    """
    handles, texts = axes.get_legend_handles_labels()
    axes.legend(
        [*handles, *(handle for handle, _ in more)],
        [*texts, *(text for _, text in more)],
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0.2)},
        loc="upper center",
        bbox_to_anchor=(0.5, -0.2),
        ncols=3 if len(handles) + len(more) <= 3 else 2,
        borderaxespad=0,
    )


def curve(axes: Axes, at: Sequence[float], values: Sequence[float], **style: Any) -> Line2D:
    """Draw a line with gaps where values are not finite, and dots for finite values between two gaps."""
    gap = [False, *map(math.isfinite, values), False]
    alone = [i for i in range(len(values)) if gap[i : i + 3] == [False, True, False]]
    if alone:
        style |= {"marker": ".", "markevery": alone}
    return axes.plot(at, values, **style)[0]


def shade(axes: Axes, intervals: Iterable[tuple[float, float]], color: str, label: str) -> None:
    """Shade intervals of a run; each is at least a line wide."""
    style = {"facecolor": (color, 0.15), "edgecolor": (color, 0.5), "linewidth": 0.6}
    _mark(axes, intervals, label, **style)


def hatch(axes: Axes, intervals: Iterable[tuple[float, float]], color: str, label: str) -> None:
    """Hatch intervals of a run."""
    _mark(axes, intervals, label, facecolor="none", edgecolor=color, hatch="////", linewidth=0)


def _mark(axes: Axes, intervals: Iterable[tuple[float, float]], label: str, **style: Any) -> None:
    for index, (begin, end) in enumerate(intervals):
        named = "_" * bool(index) + label  # a leading underscore keeps it out of the legend
        axes.axvspan(begin, end, label=named, **style)


def arrows(
    axes: Axes, x: Sequence[float], y: Sequence[float], direction: Direction, color: str, label: str
) -> None:
    """Draw arrows that start at points and show that an interval has no bound in that direction."""
    assert axes.figure is not None
    right, up = _ARROWS[direction]
    shift = ScaledTranslation(5 * right / 72, 5 * up / 72, axes.figure.dpi_scale_trans)  # type: ignore[union-attr, unused-ignore]
    axes.plot(
        x,
        y,
        linestyle="none",
        marker=arrow_marker(direction),
        markersize=7,
        markeredgewidth=0,
        color=color,
        transform=axes.transData + shift,
        label=f"_{label} {direction}",
    )


def arrow_marker(direction: Direction) -> str:
    """Return the marker of an arrow in a direction."""
    return rf"$\{direction}arrow$"


def spaced_indices(at: Sequence[float], holds: Sequence[bool], distance: float) -> Iterator[int]:
    """Yield indices at which a condition holds, at least `distance` apart."""
    last = -math.inf
    for index, (position, one) in enumerate(zip(at, holds, strict=True)):
        if one and position >= last + distance:
            last = position
            yield index
