"""Estimates of |G|^2 and tr(Sigma), their covariance, and a number with its confidence interval."""

from __future__ import annotations

import math
from typing import NamedTuple

# Weights in float32 sum to 1 only to about this. Within it, one example carries the whole step.
ROUNDING = 1e-6


class Estimate(NamedTuple):
    """An estimate of |G|^2 (`signal`) and tr(Sigma) (`noise`), both in squared units of the gradient."""

    signal: float
    noise: float

    @property
    def noise_scale(self) -> float:
        """Return tr(Sigma) / |G|^2 in examples; NaN unless both are above zero and it is finite."""
        if not (self.signal > 0 and self.noise > 0):
            return math.nan
        noise_scale = self.noise / self.signal
        return noise_scale if math.isfinite(noise_scale) else math.nan


UNDETERMINED = Estimate(math.nan, math.nan)


class Uncertainty(NamedTuple):
    """Variances and covariance of an estimate's signal and noise, in squares of their unit.

    `dof` are the degrees of freedom that these were estimated with.
    """

    signal_variance: float
    noise_variance: float
    covariance: float
    dof: float = math.inf


UNKNOWN = Uncertainty(math.nan, math.nan, math.nan, 0.0)


class IntervalEstimate(NamedTuple):
    """A number with its confidence interval; if it is undetermined, NaN and the reason.

    `high` is infinite where the measurements do not bound it. An undetermined number keeps the
    bounds that are known: NaN, 0 and infinity are no bounds.
    """

    value: float
    low: float = math.nan
    high: float = math.nan
    reason: str = ""
