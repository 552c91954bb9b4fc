"""Steps and samples to a loss against the batch size, and the critical batch between them.

McCandlish, Kaplan, Amodei and others, An Empirical Model of Large-Batch Training, 2018, arXiv:1812.06162:
(S / S_min - 1) (E / E_min - 1) = 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainc.runtime.fits.least_squares import Array, Interval, fit_with_intervals, r2

ITERATIONS = 100


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
    """Fit S = S_min + E_min / B by least squares of logarithms; raises ValueError for fewer than two batch sizes."""
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

    numbers = [
        lambda p: math.exp(p[0]),
        lambda p: math.exp(p[1]),
        lambda p: math.exp(p[1] - p[0]),
    ]
    (steps, samples, critical), fitted = fit_with_intervals(solve, predict, y, numbers)
    return BatchLaw(loss, steps, samples, critical, r2(y, predict(fitted)), tuple(points))


def _solve(batches: Array, y: Array) -> Array:
    """Return the logarithms of S_min and E_min, by steps of Gauss and Newton that are halved where they do not help."""
    log_batch = np.log(batches)
    steps = np.exp(y)
    p = np.log([steps.min() / 2, (steps * batches).min() / 2])

    def residuals(p: Array) -> Array:
        found: Array = y - np.logaddexp(p[0], p[1] - log_batch)
        return found

    for _ in range(ITERATIONS):
        left = residuals(p)
        share = np.exp(p[0] - np.logaddexp(p[0], p[1] - log_batch))
        slope = np.stack([share, 1 - share], 1)
        step = np.clip(np.linalg.lstsq(slope, left, rcond=None)[0], -2, 2)
        size = 1.0
        while size > 1e-8 and np.square(residuals(p + size * step)).sum() > np.square(left).sum():
            size /= 2
        p = p + size * step
        if np.abs(size * step).max() < 1e-12:
            break
    return p
