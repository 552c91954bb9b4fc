"""Least squares with intervals from resampled residuals."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import ndtri, stdtrit

Array = np.ndarray[Any, np.dtype[np.float64]]

RESAMPLED = 1000
LARGEST = math.log(sys.float_info.max)
LEVEL = 95
"""Percent of the resampled fits that an interval holds."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A fitted number, and the ends of its interval; NaN where there are not more points than numbers."""

    value: float
    low: float = float("nan")
    high: float = float("nan")

    def __str__(self) -> str:
        if self.low != self.low:
            return f"{self.value:.4g}"
        return f"{self.value:.4g} ({self.low:.4g} to {self.high:.4g})"


def fit_with_intervals(
    solve: Callable[[Array], Array],
    predict: Callable[[Array], Array],
    y: Array,
    numbers: Sequence[Callable[[Array], float]],
) -> tuple[list[Interval], Array]:
    """Return functions of the fitted parameters with 95% intervals, and the parameters.

    `solve` fits parameters to values y, `predict` is its inverse. Residuals are resampled around the fit by a generator
    of a fixed seed. They are scaled for the parameters that were fitted, and by Student's t over the normal quantile,
    as few residuals say little of their own spread: without that intervals of four points hold two values in three.
    """
    fitted = solve(y)
    free = len(y) - len(fitted)
    values = [number(fitted) for number in numbers]
    if free <= 0:
        return [Interval(value) for value in values], fitted
    line = predict(fitted)
    tail = (100 + LEVEL) / 200
    few = float(stdtrit(free, tail) / ndtri(tail))
    residuals = (y - line) * np.sqrt(len(y) / free) * few
    draw = np.random.default_rng(0)
    others = [solve(line + draw.choice(residuals, len(y))) for _ in range(RESAMPLED)]
    found = []
    for number, value in zip(numbers, values, strict=True):
        spread = [number(one) for one in others]
        ends = [(100 - LEVEL) / 2, (100 + LEVEL) / 2]
        low, high = np.percentile(spread, ends, method="inverted_cdf")  # of infinite ones too
        found.append(Interval(value, float(low), float(high)))
    return found, fitted


def exponential(power: float) -> float:
    """Return e to a power; infinity where that is too large for a number."""
    return math.exp(power) if power < LARGEST else math.inf


def r2(y: Array, line: Array) -> float:
    """Return the fraction of the variance of y that a line explains; 1 where y does not vary."""
    spread = float(np.square(y - y.mean()).sum())
    return 1 - float(np.square(y - line).sum()) / spread if spread > 0 else 1.0
