"""Pictures of runs, drawn from their folders: losses, rates, noise scale and figures per layer."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainc.runtime.metrics import Record, read, series

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Distinct also for most people who cannot tell red from green (Okabe and Ito).
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


@dataclass(frozen=True, slots=True)
class RunRecords:
    """The metrics of one run, with a name to tell it by."""

    name: str
    records: list[Record]
    color: str

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Return steps and values of one quantity."""
        return series(self.records, name)

    def has(self, name: str) -> bool:
        """Say whether any step measured a quantity."""
        return any(name in record for record in self.records)

    def layers(self) -> dict[str, dict[str, tuple[list[int], list[float]]]]:
        """Return what was measured per layer: quantity -> layer -> steps and values."""
        found: dict[str, dict[str, tuple[list[int], list[float]]]] = {}
        for record in self.records:
            for quantity, values in record.get("series", {}).items():
                for layer, value in values.items():
                    steps, kept = found.setdefault(quantity, {}).setdefault(layer, ([], []))
                    steps.append(record["step"])
                    kept.append(value)
        return found


Panel = tuple[str, Callable[["Axes"], None]]


def draw(run_folders: Sequence[Path], output: Path) -> Path:
    """Draw runs over each other into a PNG file and return its path; needs matplotlib."""
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as problem:
        raise ValueError("drawing needs matplotlib: install trainc[plots]") from problem
    runs = load(run_folders)
    panels = list_panels(runs)
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    with rc_context(STYLE):  # type: ignore[arg-type, unused-ignore]
        figure = Figure(figsize=(5.6 * columns, 3.3 * rows), layout="constrained", dpi=150)
        FigureCanvasAgg(figure)
        for index, (title, fill) in enumerate(panels):
            axes = figure.add_subplot(rows, columns, index + 1)
            fill(axes)
            axes.set_title(title)
            axes.set_xlabel("step")
            axes.margins(x=0.01)
            if axes.get_legend_handles_labels()[0]:
                axes.legend()
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output, format="png", facecolor="white")
    return output


def load(run_folders: Sequence[Path]) -> list[RunRecords]:
    """Read the metrics of runs, named by the parts of their paths in which they differ."""
    if not run_folders:
        raise ValueError("there is no run to draw")
    folders = [folder.resolve() for folder in run_folders]
    shared = Path(os.path.commonpath([folder.parent for folder in folders]))
    runs: list[RunRecords] = []
    for index, folder in enumerate(folders):
        path = folder / "metrics.jsonl"
        if not path.exists():
            raise ValueError(f"{run_folders[index]} holds no run: there is no metrics.jsonl in it")
        name = folder.relative_to(shared).as_posix()
        runs.append(RunRecords(name, read(path), COLORS[index % len(COLORS)]))
    if not any(run.records for run in runs):
        raise ValueError("no step was measured yet")
    return runs


def list_panels(runs: list[RunRecords]) -> list[Panel]:
    """Return the panels that have something to show: title and what fills the axes."""
    panels: list[Panel] = [("Loss", lambda axes: _losses(axes, runs))]
    if any(run.has("lr_max") for run in runs):
        panels.append(("Learning rate", lambda axes: _rates(axes, runs)))
    scales = sorted({n for run in runs for record in run.records for n in record if _is_scale(n)})
    if scales:
        panels.append(("Noise scale and batch", lambda axes: _scales(axes, runs, scales)))
    for run in runs:
        for quantity, layers in run.layers().items():
            title = f"{quantity} by layer" + (f", {run.name}" if len(runs) > 1 else "")
            panels.append((title, lambda axes, layers=layers: _layers(axes, layers)))  # type: ignore[misc]
    return panels


def _is_scale(name: str) -> bool:
    return name == "gns" or name.endswith("_gns")


def smooth(values: Sequence[float], span: int) -> list[float]:
    """Return the running mean with exponential weights over about `span` values, unbiased at first.

    A value that is not finite leaves a gap and does not enter the mean.
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


def _losses(axes: Axes, runs: list[RunRecords]) -> None:
    for run in runs:
        steps, losses = run.series("loss")
        span = max(1, len(losses) // 50)
        label = "training" if len(runs) == 1 else run.name
        if span > 1:
            axes.plot(steps, losses, color=run.color, alpha=0.2, linewidth=0.6)
        axes.plot(steps, smooth(losses, span), color=run.color, linewidth=1.5, label=label)
        broken = [step for step, loss in zip(steps, losses, strict=True) if not math.isfinite(loss)]
        for step in broken[:1]:
            axes.axvline(step, color=run.color, linestyle=":", label=f"first non-finite, {step}")
        steps, losses = run.series("eval_loss")
        if steps:
            axes.plot(
                steps,
                losses,
                color=run.color,
                linestyle="--",
                linewidth=1,
                marker="o",
                markersize=3,
                markerfacecolor="white",
                label="evaluation" if len(runs) == 1 else None,
            )
    if len(runs) > 1 and any(run.has("eval_loss") for run in runs):
        axes.plot([], [], "--o", color="#555555", markersize=3, linewidth=1, label="evaluation")


def _rates(axes: Axes, runs: list[RunRecords]) -> None:
    for run in runs:
        steps, high = run.series("lr_max")
        _, low = run.series("lr_min")
        label = None if len(runs) == 1 else run.name
        axes.plot(steps, high, color=run.color, linewidth=1.3, label=label)
        if len(low) == len(high) and low != high:
            axes.plot(steps, low, color=run.color, linewidth=0.8)
            axes.fill_between(
                steps,
                low,
                high,
                color=run.color,
                alpha=0.2,
                linewidth=0,
                label="over all parameters" if len(runs) == 1 else None,
            )
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))


def _scales(axes: Axes, runs: list[RunRecords], scales: list[str]) -> None:
    lines = ("-", "-.", ":", (0, (1, 3)))
    for run in runs:
        prefix = "" if len(runs) == 1 else f"{run.name} "
        for index, name in enumerate(scales):
            steps, values = run.series(name)
            if steps:
                above = [value if value > 0 else math.nan for value in values]
                line: Any = lines[index % len(lines)]
                label = f"{prefix}{name}"
                axes.plot(steps, above, linestyle=line, color=run.color, linewidth=1.3, label=label)
        steps, batches = run.series("batch")
        axes.step(
            steps,
            batches,
            where="post",
            color="#555555" if len(runs) == 1 else run.color,
            alpha=0.7,
            linewidth=1,
            linestyle="--",
            label=f"{prefix}batch",
        )
    axes.set_yscale("log")
    axes.set_ylabel("samples")


def _layers(axes: Axes, layers: dict[str, tuple[list[int], list[float]]]) -> None:
    from matplotlib import colormaps

    colors = colormaps["viridis"]
    last = max(1, len(layers) - 1)
    few = len(layers) <= 8
    for index, (name, (steps, values)) in enumerate(layers.items()):
        # The brightest end of the map is lost on white; of many layers only the ends are named.
        label = name if few or index in (0, len(layers) - 1) else None
        axes.plot(steps, values, color=colors(0.9 * index / last), linewidth=1, label=label)
