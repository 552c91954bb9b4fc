"""Pictures of spectra: the exponent of each weight beside its null, and each spectrum with the tail that was fitted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from trainc.runtime.report.axes import Panel, log_ticks, write
from trainc.runtime.report.plots import COLORS, draw_rows

COLUMNS = 4
ROW_INCHES = 0.2
BINS = 40
BELOW = 1e-6
"""Relative to the largest eigenvalue: what is smaller is not drawn."""
_SPECTRUM, _TAIL, _NULL = COLORS[0], COLORS[1], COLORS[6]


@dataclass(frozen=True, slots=True)
class DrawnSpectrum:
    """Ascending eigenvalues of a weight, its exponent `alpha` over the tail from `xmin` on, and those of its null.

    `ratio` is the short side over the long side of its matrices. Numbers that are not known are NaN.
    """

    name: str
    eigenvalues: Sequence[float]
    ratio: float
    alpha: float
    xmin: float
    null: float
    spread: float


def draw_spectra(found: Sequence[DrawnSpectrum], output: Path) -> Path:
    """Draw exponents and spectra into a PNG file, and return its path."""
    height = 1.4 + ROW_INCHES * max(4, len(found))
    overview = Panel("alpha by weight", partial(_draw_exponents, found=found), height, wide=True)
    panels = [Panel(_short(one.name), partial(_draw_one, one=one), 2.6) for one in found]
    rows = [panels[at : at + COLUMNS] for at in range(0, len(panels), COLUMNS)]
    return draw_rows([[overview], *rows], output, width=3.6)


def _short(name: str, most: int = 34) -> str:
    return name if len(name) <= most else f"...{name[3 - most :]}"


def _draw_exponents(axes: Axes, found: Sequence[DrawnSpectrum]) -> None:
    rows = np.arange(len(found))
    null, spread = (np.array([getattr(one, part) for one in found]) for part in ("null", "spread"))
    axes.errorbar(
        null,
        rows,
        xerr=2 * spread,
        fmt="|",
        color=_NULL,
        markersize=8,
        elinewidth=3,
        alpha=0.5,
        label="independent entries, with 2 standard deviations",
    )
    axes.plot([one.alpha for one in found], rows, "o", color=_SPECTRUM, markersize=4, label="alpha")
    axes.set_yticks(rows, [one.name for one in found])
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.set_xlabel("exponent of the tail; smaller is a heavier tail")
    axes.plot([], [], color=_TAIL, label="below: the fitted tail, over the density of the spectrum")
    axes.plot(
        [], [], color=_NULL, linestyle="--", label="below: the density of independent entries"
    )
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0)


def _draw_one(axes: Axes, one: DrawnSpectrum) -> None:
    """Draw the density of a spectrum over ln(lambda), with the fitted power law and the law of independent entries."""
    values = np.asarray(one.eigenvalues, dtype=float)
    if not len(values) or not np.isfinite(values).all() or not values[-1] > 0:
        write(axes, "no spectrum: the weight is zero or not finite")
        return
    total, mean = len(values), float(values.mean())
    values = values[values > BELOW * values[-1]]
    low, high = float(values[0]), float(values[-1])
    edges = np.geomspace(low, high * (1 + 1e-9), min(BINS, max(4, len(values) // 4)) + 1)
    counts, _ = np.histogram(values, edges)
    width = np.log(edges[1] / edges[0])
    axes.stairs(counts / (total * width), edges, color=_SPECTRUM, fill=True, alpha=0.35)
    at = np.geomspace(low, high, 400)
    axes.plot(at, _independent(at, one.ratio, mean), color=_NULL, linewidth=1, linestyle="--")
    top = float((counts / (total * width)).max())
    if math.isfinite(one.alpha):
        tail = np.geomspace(one.xmin, high, 50)
        share = float((values >= one.xmin).sum()) / total
        density = share * (one.alpha - 1) * (tail / one.xmin) ** (1 - one.alpha)
        axes.plot(tail, density, color=_TAIL, linewidth=1.6)
        axes.axvline(one.xmin, color=_TAIL, linewidth=0.8, linestyle=":")
        top = max(top, float(density.max()))
    known = f"alpha {one.alpha:.2f}" if math.isfinite(one.alpha) else "no tail: the rank is low"
    text = f"{known}, null {one.null:.2f}"
    axes.text(0.03, 0.95, text, va="top", fontsize=8, transform=axes.transAxes)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(0.3 / (total * float(width)), 3 * top)
    log_ticks(axes.xaxis, *axes.get_xlim(), most=4)
    log_ticks(axes.yaxis, *axes.get_ylim(), most=4)


def _independent(at: np.ndarray, ratio: float, mean: float) -> np.ndarray:
    """Return the density over ln(lambda) of the law of Marchenko and Pastur with this mean; NaN outside of it."""
    x = at / mean
    inside = ((1 + math.sqrt(ratio)) ** 2 - x) * (x - (1 - math.sqrt(ratio)) ** 2)
    density: np.ndarray = np.sqrt(np.where(inside > 0, inside, np.nan)) / (2 * math.pi * ratio)
    return density
