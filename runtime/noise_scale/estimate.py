"""What is estimated of the gradient's noise, how sure it is, and the interval of a ratio."""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist
from typing import NamedTuple

# What float32 weights may sum to beside 1: nearer to it, one example carries the whole step.
ROUNDING = 1e-6

# From here on the expansion of Student's quantile around the normal one is exact to 1e-6.
_MANY = 100


class Estimate(NamedTuple):
    """An estimate of |G|^2 (`signal`) and tr(Sigma) (`noise`), both in squared gradient units."""

    signal: float
    noise: float

    @property
    def scale(self) -> float:
        """Return tr(Sigma) / |G|^2 in examples; NaN unless both are above zero and it is finite."""
        if not (self.signal > 0 and self.noise > 0):
            return math.nan
        scale = self.noise / self.signal
        return scale if math.isfinite(scale) else math.nan


UNDETERMINED = Estimate(math.nan, math.nan)


class Spread(NamedTuple):
    """Variances and covariance of an estimate's parts, in squares of their unit.

    `freedom` is how many independent deviations they were estimated from.
    """

    signal: float
    noise: float
    covariance: float
    dof: float = math.inf


UNKNOWN = Spread(math.nan, math.nan, math.nan, 0.0)


class Reading(NamedTuple):
    """A noise scale in examples with its interval, or NaN with the reason why it has none.

    `high` is infinite where the measurements do not bound it. An undetermined reading keeps what
    bounds there are: NaN, 0 and infinity say nothing.
    """

    scale: float
    low: float = math.nan
    high: float = math.nan
    reason: str = ""

    @property
    def determined(self) -> bool:
        """Return whether `scale` is a finite positive number."""
        return not self.reason


def ratio_interval(estimate: Estimate, spread: Spread, level: float = 0.9) -> tuple[float, float]:
    """Return the interval of noise / signal that holds the true ratio with probability `level`.

    Fieller's theorem (1954): the ratios R with (n - R s)^2 <= t^2 Var(n - R s), t being Student's
    quantile, which unlike the delta method needs no signal far from zero. Neither part can truly
    be negative, so a negative estimate is taken for zero: that only widens the interval. `high` is
    infinite when the signal is not significantly above zero, `low` is 0 when the noise is not.
    """
    if any(map(math.isnan, (*estimate, *spread))):
        return math.nan, math.nan
    bound = student(level, spread.dof) ** 2
    if math.isinf(bound):
        return 0.0, math.inf
    signal, noise = max(estimate.signal, 0.0), max(estimate.noise, 0.0)
    # The ends are the roots of a R^2 - 2 b R + c; their product is c / a.
    a = signal * signal - bound * spread.signal
    b = noise * signal - bound * spread.covariance
    c = noise * noise - bound * spread.noise
    larger = b + math.sqrt(max(b * b - a * c, 0.0))
    low = c / larger if c > 0 and larger > 0 else 0.0
    return low, larger / a if a > 0 else math.inf


def student(level: float, dof: float) -> float:
    """Return the t that Student's variable stays within, up to sign, with probability `level`.

    `freedom` is rounded down to whole numbers, which errs to the wide side; below one there is no
    such bound: infinity.
    """
    if not 0 < level < 1:
        raise ValueError(f"level = {level}: an interval's probability is between 0 and 1")
    if not dof >= 1:
        return math.inf
    return _few(level, int(dof)) if dof < _MANY else _many(level, dof)


def _many(level: float, dof: float) -> float:
    """Return Student's quantile by its expansion in 1 / freedom (Abramowitz & Stegun 26.7.5)."""
    z = NormalDist().inv_cdf(0.5 + level / 2)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / dof + second / dof**2 + third / dof**3


@lru_cache(maxsize=4096)
def _few(level: float, dof: int) -> float:
    """Return Student's quantile by halving: with t = sqrt(freedom) tan(x), x has density cos^(freedom - 1)."""
    low, high = 0.0, math.pi / 2
    wanted = level * _cosine_power(dof - 1, high)
    for _ in range(60):
        middle = (low + high) / 2
        if _cosine_power(dof - 1, middle) < wanted:
            low = middle
        else:
            high = middle
    return math.sqrt(dof) * math.tan(low)


def _cosine_power(power: int, x: float) -> float:
    """Return the integral of cos^power from 0 to x, by parts down to power 1 or 0."""
    cos, sin = math.cos(x), math.sin(x)
    total = sin if power % 2 else x
    for k in range(2 + power % 2, power + 1, 2):
        total = (cos ** (k - 1) * sin + (k - 1) * total) / k
    return total
