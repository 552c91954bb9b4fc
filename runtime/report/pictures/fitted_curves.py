"""Curves of what runs recorded, with fitted ones beside them, and curves of cosines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from matplotlib.axes import Axes

from trainc.runtime.report.axes import curve, set_run_axis
from trainc.runtime.report.plots import COLORS
from trainc.runtime.report.run_records import RunRecords

DASHES = ("--", ":", "-.", (0, (6, 1)))
STYLES = ("-", "--", ":")


@dataclass(frozen=True)
class Fitted:
    """What a run recorded, and the fits of it, each at the same positions, by the text of the legend."""

    run: RunRecords
    at: Sequence[float]
    values: Sequence[float]
    fits: Mapping[str, Sequence[float]] = field(default_factory=dict)
    best: str = ""
    """The fit that is drawn where there are several runs."""


def draw_fitted(axes: Axes, measured: Sequence[Fitted], runs: Sequence[RunRecords]) -> None:
    """Draw each run's curve, with all of its fits where there is one run, and the best where there are several."""
    alone = len(runs) == 1
    for one in measured:
        color, label = one.run.color, "measured" if alone else one.run.name
        curve(axes, one.at, one.values, color=color, linewidth=2.2 if alone else 1.4, label=label)
        for number, (text, values) in enumerate(one.fits.items()):
            dashes = DASHES[number % len(DASHES)]
            if alone:
                own = COLORS[1 + number % (len(COLORS) - 1)]
                axes.plot(one.at, values, color=own, linestyle=dashes, linewidth=1.1, label=text)
            elif text == one.best:
                axes.plot(one.at, values, color=color, linestyle="--", linewidth=1.1)
    set_run_axis(axes, runs)
    axes.ticklabel_format(axis="y", useOffset=False)


def draw_cosines(
    axes: Axes,
    measured: Sequence[tuple[RunRecords, Mapping[str, str]]],
    runs: Sequence[RunRecords],
) -> None:
    """Draw cosines of runs, from -1 to 1; of each run, the names of the recorded quantities by their texts."""
    for run, quantities in measured:
        for (text, name), style in zip(quantities.items(), STYLES, strict=False):
            at, values = run.series(name)
            label = text if len(runs) == 1 else f"{run.name} {text}"
            curve(axes, at, values, color=run.color, linestyle=style, label=label)
    axes.axhline(0, color="#555555", linewidth=0.8)
    axes.set_ylim(-1.05, 1.05)
    axes.set_ylabel("cosine")
    set_run_axis(axes, runs)
