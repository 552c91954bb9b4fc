"""Pictures of runs: losses, learning rates, the panels of their clauses, and figures per layer."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from trainc.runtime.report.axes import (
    NON_FINITE,
    Panel,
    curve,
    plain_numbers,
    set_run_axis,
    shade,
    write,
)
from trainc.runtime.report.picture_file import picture_format
from trainc.runtime.report.run_records import RunRecords, common_counter, has_non_finite_loss

# Distinct also for most people with red-green colour blindness (Okabe and Ito).
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.labelsize": 9,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "font.family": "DejaVu Sans",
}
EVALUATION: dict[str, Any] = {"linestyle": "--", "marker": "o", "markersize": 3, "linewidth": 1}


def draw(runs: Sequence[RunRecords], own: Sequence[Panel], output: Path) -> Path:
    """Draw runs over each other into a file, with the panels `own` of their clauses, and return its path."""
    return draw_rows(_arrange(list_panels(runs, own)), output)


def draw_rows(rows: Sequence[Sequence[Panel]], output: Path, width: float = 5.6) -> Path:
    """Draw rows of panels, each `width` inches wide, into a file, and return its path.

    Raises ValueError where the file's name ends in the name of no format that can be drawn.
    """
    columns = max(len(row) for row in rows)
    heights = [max(panel.height for panel in row) for row in rows]
    with rc_context(STYLE):  # type: ignore[arg-type, unused-ignore]
        size = (width * columns, sum(heights))
        figure = Figure(figsize=size, layout="constrained", dpi=150)
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(len(rows), columns, height_ratios=heights)
        for index, row in enumerate(rows):
            for column, panel in enumerate(row):
                place = slice(None) if panel.wide else column
                _draw_panel(figure.add_subplot(grid[index, place]), panel)
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output, format=picture_format(output), facecolor="white")
    return output


def _arrange(panels: Sequence[Panel]) -> list[list[Panel]]:
    """Return panels in rows: two in a row, then the wide ones, each alone."""
    narrow = [panel for panel in panels if not panel.wide]
    pairs = [narrow[at : at + 2] for at in range(0, len(narrow), 2)]
    return pairs + [[panel] for panel in panels if panel.wide]


def _draw_panel(axes: Axes, panel: Panel) -> None:
    """Draw a panel; where that fails it says so, and the others are drawn."""
    try:
        panel.draw(axes)
    except Exception as error:
        write(axes, f"cannot be drawn: {type(error).__name__}: {error}")
    axes.set_title(panel.title)
    if axes.get_legend() is None and axes.get_legend_handles_labels()[0]:
        axes.legend()


def read_runs(run_folders: Sequence[Path]) -> list[RunRecords]:
    """Read the metrics of runs, named by the parts of their paths in which they differ."""
    if not run_folders:
        raise ValueError("expected the folder of at least one run")
    folders = [folder.resolve() for folder in run_folders]
    shared = Path(os.path.commonpath([folder.parent for folder in folders]))
    runs: list[RunRecords] = []
    for index, folder in enumerate(folders):
        path = folder / "metrics.jsonl"
        if not path.exists():
            raise ValueError(
                f"{run_folders[index]} is not the folder of a run: it has no metrics.jsonl"
            )
        name = folder.relative_to(shared).as_posix()
        runs.append(RunRecords.of(folder, name, COLORS[index % len(COLORS)]))
    if not any(run.records for run in runs):
        raise ValueError("these runs have no records yet: wait for the first step")
    counter = common_counter([run.records for run in runs if run.records])
    return [replace(run, counter=counter) for run in runs]


def list_panels(runs: Sequence[RunRecords], own: Sequence[Panel]) -> list[Panel]:
    """Return the panels that the records of the runs fill, with those of their clauses."""
    panels = [Panel("Loss", partial(_draw_losses, runs=runs))]
    if any(run.has("lr_max") for run in runs):
        panels.append(Panel("Learning rate", partial(_draw_rates, runs=runs)))
    panels += own
    drawn = {quantity for panel in own for quantity in panel.covers}
    for run in runs:
        for quantity, layers in run.layers().items():
            if quantity not in drawn:
                title = f"{quantity} by layer" + (f", {run.name}" if len(runs) > 1 else "")
                draw = partial(_draw_layers, layers=layers, runs=runs)
                panels.append(Panel(title, draw))
    return panels


def smooth(values: Sequence[float], span: int) -> list[float]:
    """Return the exponential running mean over about `span` values, without bias at the start.

    A value that is not finite leaves a gap and is not part of the mean.
    """
    keep = 1 - 1 / max(1, span)
    total = weight = 0.0
    means: list[float] = []
    for value in values:
        if math.isfinite(value):
            total, weight = keep * total + value, keep * weight + 1
            means.append(total / weight)
        else:
            means.append(math.nan)
    return means


def _draw_losses(axes: Axes, runs: Sequence[RunRecords]) -> None:
    for run in runs:
        at, losses = run.series("loss")
        span = max(1, len(losses) // 50)
        label = "training" if len(runs) == 1 else run.name
        if span > 1:
            axes.plot(at, losses, color=run.color, alpha=0.2, linewidth=0.6)
        curve(axes, at, smooth(losses, span), color=run.color, linewidth=1.5, label=label)
        first = next((r["step"] for r in run.records if has_non_finite_loss(r)), None)
        color, label = NON_FINITE if len(runs) == 1 else run.color, f"first at step {first}"
        shade(axes, run.intervals_where(has_non_finite_loss), color, f"not finite, {label}")
        at, losses = run.series("eval_loss")
        if at:
            style = EVALUATION | {"color": run.color, "markerfacecolor": "white"}
            axes.plot(at, losses, **style, label="evaluation" if len(runs) == 1 else None)
    if len(runs) > 1 and any(run.has("eval_loss") for run in runs):
        axes.plot([], [], **EVALUATION, color="#555555", label="evaluation")
    axes.set_ylabel("loss")
    set_run_axis(axes, runs)


def _draw_rates(axes: Axes, runs: Sequence[RunRecords]) -> None:
    for run in runs:
        at, high = run.series("lr_max")
        _, low = run.series("lr_min")
        label = None if len(runs) == 1 else run.name
        curve(axes, at, high, color=run.color, linewidth=1.3, label=label)
        if len(low) == len(high) and low != high:
            axes.plot(at, low, color=run.color, linewidth=0.8)
            label = "over all parameters" if len(runs) == 1 else None
            axes.fill_between(at, low, high, color=run.color, alpha=0.2, linewidth=0, label=label)
    plain_numbers(axes.yaxis)
    axes.set_ylabel("learning rate")
    set_run_axis(axes, runs)


def _draw_layers(
    axes: Axes, layers: dict[str, tuple[list[float], list[float]]], runs: Sequence[RunRecords]
) -> None:
    colors = colormaps["viridis"]
    last = max(1, len(layers) - 1)
    name_all = len(layers) <= 8
    for index, (name, (at, values)) in enumerate(layers.items()):
        # The brightest colours cannot be seen on white; of many layers only the first and the last are named.
        label = name if name_all or index in (0, len(layers) - 1) else None
        curve(axes, at, values, color=colors(0.9 * index / last), linewidth=1, label=label)
    set_run_axis(axes, runs)
