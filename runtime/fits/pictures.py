"""Pictures of the laws: points and curves on logarithmic axes."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from trainc.runtime.fits.batch import BatchLaw
from trainc.runtime.fits.transfer import TransferLaw
from trainc.runtime.report.axes import Panel, legend_below
from trainc.runtime.report.plots import COLORS, draw_rows


def draw_transfer(law: TransferLaw, output: Path) -> Path:
    """Draw the data transferred against the fine-tuning data, a colour a size, and return the path."""
    title = f"Data transferred: k {law.k.value:.3g}, alpha {law.alpha.value:.3g}, beta {law.beta.value:.3g}"
    return draw_rows([[Panel(title, partial(_draw_transfer, law=law), height=4)]], output)


def _draw_transfer(axes: Axes, law: TransferLaw) -> None:
    data = np.geomspace(*law.data, 50)
    for i, size in enumerate(sorted({point.run.size for point in law.points})):
        color = COLORS[i % len(COLORS)]
        points = [point for point in law.points if point.run.size == size]
        at = [point.run.data for point in points]
        named = f"{size:.3g} parameters"
        axes.plot(at, [p.amount for p in points], "o", color=color, label=named)
        axes.plot(data, [law.amount(d, size) for d in data], color=color, linewidth=1)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("fine-tuning data, tokens")
    axes.set_ylabel("data transferred, tokens")
    legend_below(axes, (Line2D([], [], color="0.5", linewidth=1), "law"))


def draw_batch(law: BatchLaw, output: Path) -> Path:
    """Draw steps and samples against the batch size, with the critical batch and the noise, and return the path."""
    panels = [
        Panel(f"Steps to a loss of {law.loss:.4g}", partial(_draw_steps, law=law), height=4),
        Panel(f"Samples to a loss of {law.loss:.4g}", partial(_draw_samples, law=law), height=4),
    ]
    return draw_rows([panels], output)


def _draw_steps(axes: Axes, law: BatchLaw) -> None:
    _draw_batch(axes, law, [p.steps for p in law.points], "steps", samples=False)


def _draw_samples(axes: Axes, law: BatchLaw) -> None:
    _draw_batch(axes, law, [p.samples for p in law.points], "samples", samples=True)


def _draw_batch(
    axes: Axes, law: BatchLaw, values: list[float], label: str, *, samples: bool
) -> None:
    batches = [point.batch for point in law.points]
    low, high = min(*batches, law.critical.value), max(*batches, law.critical.value)
    at = np.geomspace(low / 1.5, high * 1.5, 80)
    line = [law.steps_at(batch) * (batch if samples else 1) for batch in at]
    axes.plot(at, line, color=COLORS[0], linewidth=1.2, label="law")
    axes.plot(batches, values, "o", color=COLORS[0], label="runs")
    axes.axvline(law.critical.value, color=COLORS[1], linewidth=1, label="critical batch")
    if law.critical.low == law.critical.low:
        ends = np.clip([law.critical.low, law.critical.high], at[0], at[-1])
        axes.axvspan(*ends, color=COLORS[1], alpha=0.12)
    measured = {
        name: np.mean([dict(p.noise)[name] for p in law.points if name in dict(p.noise)])
        for p in law.points
        for name, _ in p.noise
    }
    for i, (name, value) in enumerate(measured.items()):
        color = COLORS[(2 + i) % len(COLORS)]
        axes.axvline(float(value), color=color, linewidth=1, linestyle="--", label=f"{name}, mean")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("batch, samples")
    axes.set_ylabel(label)
    legend_below(axes)
