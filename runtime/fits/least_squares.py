"""Least squares with intervals from resampled residuals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]

RESAMPLED = 1000
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

    `solve` fits parameters to values y, `predict` is its inverse. Residuals are resampled around the fit, scaled for
    the parameters that were fitted, by a generator of a fixed seed.
    """
    fitted = solve(y)
    free = len(y) - len(fitted)
    values = [number(fitted) for number in numbers]
    if free <= 0:
        return [Interval(value) for value in values], fitted
    line = predict(fitted)
    residuals = (y - line) * np.sqrt(len(y) / free)
    draw = np.random.default_rng(0)
    others = [solve(line + draw.choice(residuals, len(y))) for _ in range(RESAMPLED)]
    found = []
    for number, value in zip(numbers, values, strict=True):
        spread = [number(one) for one in others]
        low, high = np.percentile(spread, [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
        found.append(Interval(value, float(low), float(high)))
    return found, fitted


def r2(y: Array, line: Array) -> float:
    """Return the fraction of the variance of y that a line explains; 1 where y does not vary."""
    spread = float(np.square(y - y.mean()).sum())
    return 1 - float(np.square(y - line).sum()) / spread if spread > 0 else 1.0
