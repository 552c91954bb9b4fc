"""Steps and samples to a loss against the batch size, and the critical batch between them.

McCandlish, Kaplan, Amodei and others, An Empirical Model of Large-Batch Training, 2018, arXiv:1812.06162:
(S / S_min - 1) (E / E_min - 1) = 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainc.runtime.fits.least_squares import Array, Interval, exponential, fit_with_intervals, r2

ITERATIONS = 100
TRIED = 60
FAR = 12.0
"""How far beyond the batches a critical batch is looked for, as a logarithm."""
NOTHING = 1e-3
"""What a term of the law is, as a fraction of the other one, where the runs do not show it."""


@dataclass(frozen=True, slots=True)
class Reached:
    """A run that reached the loss: after how many steps and samples, and the noise that it measured until then.

    `noise` has the mean of each signal that counts samples, by name.
    """

    name: str
    steps: float
    samples: float
    noise: tuple[tuple[str, float], ...] = ()

    @property
    def batch(self) -> float:
        """Return the mean batch size."""
        return self.samples / self.steps


@dataclass(frozen=True, slots=True)
class BatchLaw:
    """The least steps and samples to a loss, and the batch at which each is twice its least; with intervals."""

    loss: float
    steps: Interval
    samples: Interval
    critical: Interval
    r2: float
    points: tuple[Reached, ...]

    def steps_at(self, batch: float) -> float:
        """Return the steps at a batch size by the law."""
        return self.steps.value + self.samples.value / batch


def fit_batch(loss: float, points: Sequence[Reached]) -> BatchLaw:
    """Fit S = S_min + E_min / B by least squares of logarithms.

    Raises ValueError for fewer than two batch sizes, and where steps do not fall with the batch, or fall as much as it
    grows: then the critical batch is beyond all of them, and nothing says how far.
    """
    batches = np.array([point.batch for point in points])
    if len({round(math.log(batch), 3) for batch in batches}) < 2:
        raise ValueError(
            "the law needs runs with two different batch sizes, and intervals need three: add runs"
        )
    y = np.log([point.steps for point in points])

    def predict(p: Array) -> Array:
        found: Array = np.logaddexp(p[0], p[1] - np.log(batches))
        return found

    def solve(values: Array) -> Array:
        return _solve(batches, values)

    least, most = float(batches.min()), float(batches.max())

    def critical_at(p: Array) -> float:
        """Return the critical batch; 0 or infinity where one of the terms is nothing beside the other at each batch."""
        found = exponential(p[1] - p[0])
        return 0.0 if found < NOTHING * least else math.inf if found > most / NOTHING else found

    numbers = [
        lambda p: 0.0 if critical_at(p) == math.inf else exponential(p[0]),
        lambda p: 0.0 if critical_at(p) == 0 else exponential(p[1]),
        critical_at,
    ]
    (steps, samples, critical), fitted = fit_with_intervals(solve, predict, y, numbers)
    _require_between(critical.value, least, most)
    return BatchLaw(loss, steps, samples, critical, r2(y, predict(fitted)), tuple(points))


def _require_between(critical: float, least: float, most: float) -> None:
    """Raise ValueError where the critical batch is 0 or infinite: batches from least to most do not show it."""
    seen = f"with batches of {least:.4g} to {most:.4g} samples the steps"
    if critical == 0:
        raise ValueError(
            f"{seen} do not fall as the batch grows: all are beyond the critical batch, or rates were not chosen for"
            " each. Add runs with smaller batches"
        )
    if critical == math.inf:
        raise ValueError(
            f"{seen} fall as much as the batch grows: all are below the critical batch. Add runs with larger batches"
        )


def _solve(batches: Array, y: Array) -> Array:
    """Return the logarithms of S_min and E_min.

    With the critical batch c = E_min / S_min the best log S_min is the mean of y - log(1 + c / B), so that only c is
    looked for: from the best of some, by steps of Gauss and Newton that are halved where they do not help.
    """
    log_batch = np.log(batches)
    low, high = float(log_batch.min()) - FAR, float(log_batch.max()) + FAR

    def residuals(c: float) -> Array:
        found: Array = y - np.logaddexp(0, c - log_batch)
        return np.asarray(found - found.mean())

    tried = np.linspace(low, high, TRIED)
    every = y - np.logaddexp(0, tried[:, None] - log_batch)
    c = float(tried[np.square(every - every.mean(1, keepdims=True)).sum(1).argmin()])
    for _ in range(ITERATIONS):
        left = residuals(c)
        slope = 1 / (1 + np.exp(log_batch - c))
        slope -= slope.mean()
        steepness = float(slope @ slope)
        step = float(np.clip(slope @ left / steepness, -2, 2)) if steepness > 0 else 0.0
        size = 1.0
        while (
            size > 1e-8
            and np.square(residuals(_within(c + size * step, low, high))).sum() > left @ left
        ):
            size /= 2
        before, c = c, _within(c + size * step, low, high)
        if abs(c - before) < 1e-12:
            break
    steps = float((y - np.logaddexp(0, c - log_batch)).mean())
    return np.array([steps, steps + c])


def _within(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)
