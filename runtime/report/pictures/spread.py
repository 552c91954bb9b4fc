"""What a quantity is over several processes of one run: filled from the lowest to the highest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import Patch

from trainc.runtime.report.plots import smooth
from trainc.runtime.report.run_records import RunRecords

OPACITY = 0.2


def fill_spread(axes: Axes, run: RunRecords, names: Sequence[str], span: int = 1) -> None:
    """Fill between the second and the third of three quantities where the first is, as running means over `span`."""
    at, _ = run.series(names[0])
    low, high = (smooth(values_at(run, name, at), span) for name in names[1:])
    axes.fill_between(at, low, high, color=run.color, alpha=OPACITY, linewidth=0)


def spread_entry(runs: Sequence[RunRecords]) -> tuple[Any, str]:
    """Return the entry of a legend for what is filled."""
    swatches = tuple(Patch(facecolor=run.color, alpha=OPACITY) for run in runs)
    return swatches, "lowest to highest"


def values_at(run: RunRecords, name: str, at: Sequence[float]) -> list[float]:
    """Return a quantity at positions, NaN where a run has none."""
    found = dict(zip(*run.series(name), strict=True))
    return [found.get(position, math.nan) for position in at]


def mark_positions(axes: Axes, at: Sequence[float], text: str) -> None:
    """Mark positions at the lower edge."""
    axes.plot(
        at,
        [0.0] * len(at),
        linestyle="none",
        marker="|",
        markersize=7,
        color="#555555",
        transform=axes.get_xaxis_transform(),
        label=text,
    )
