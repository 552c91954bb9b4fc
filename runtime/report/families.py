"""Curves of a family of figures that fall below a limit one by one, and the times at which they do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib import colormaps
from matplotlib.axes import Axes

from trainc.runtime.report.axes import curve, legend_below, set_run_axis
from trainc.runtime.report.run_records import RunRecords

NAMED = 6
"""The most curves of which a legend names each."""


def shades(count: int) -> list[tuple[float, float, float, float]]:
    """Return so many colours from dark to light; the brightest cannot be seen on white."""
    return [colormaps["viridis"](0.9 * i / max(1, count - 1)) for i in range(count)]


def draw_family(
    axes: Axes,
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    limit: float,
    label: str,
    runs: Sequence[RunRecords],
) -> None:
    """Draw a curve for each name, from dark to light in their order, and the limit as a line; a legend names them."""
    ends = [*series][:1] + [*series][-1:]
    for color, (name, (at, values)) in zip(shades(len(series)), series.items(), strict=True):
        # Of many the first and the last are named: the others are between them, as their colours are.
        named = name if len(series) <= NAMED or name in ends else "_"
        curve(axes, at, values, color=color, linewidth=1.4, label=named)
    axes.axhline(limit, color="0.5", linewidth=0.8, linestyle="--", label=f"limit, {limit:g}")
    set_run_axis(axes, runs)
    axes.set_yscale("log")
    axes.set_ylabel(label)
    legend_below(axes)


def draw_times(
    axes: Axes,
    names: Sequence[str],
    sizes: Sequence[float],
    times: Sequence[float | None],
    labels: tuple[str, str, str],
) -> None:
    """Draw sizes as bars and times as points on an axis of their own, with a cross at its top for None, not reached.

    `labels` are those of the horizontal axis, of the sizes and of the times.
    """
    axes.bar(range(len(names)), sizes, color="0.8")
    axes.set_xticks(range(len(names)), names)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    points = axes.twinx()
    points.grid(
        visible=False
    )  # beside that of the sizes its lines would be read as theirs, and cross the bars
    reached = [(i, at) for i, at in enumerate(times) if at is not None]
    points.plot([i for i, _ in reached], [at for _, at in reached], "o", color="#2166AC")
    points.set_ylim(bottom=0)
    points.set_ylabel(labels[2])
    if missing := [i for i, at in enumerate(times) if at is None]:
        top, place = [1.0] * len(missing), points.get_xaxis_transform()
        points.plot(
            missing, top, "x", color="#2166AC", transform=place, clip_on=False, label="not yet"
        )
        legend_below(points)
