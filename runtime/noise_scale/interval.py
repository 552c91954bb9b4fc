"""Confidence intervals of a ratio, by Fieller's theorem."""

from __future__ import annotations

import math

from trainc.runtime.noise_scale.estimate import Estimate, Uncertainty
from trainc.runtime.report.student_t import student_t_quantile


def ratio_interval(
    estimate: Estimate, uncertainty: Uncertainty, level: float = 0.9
) -> tuple[float, float]:
    """Return the interval of noise / signal that holds the true ratio with probability `level`.

    Fieller's theorem (1954): the ratios R with (n - R s)^2 <= t^2 Var(n - R s), t being Student's
    quantile, which unlike the delta method needs no signal far from zero. Neither part can truly
    be negative, so a negative estimate is taken for zero: that only widens the interval. `high` is
    infinite when the signal is not significantly above zero, `low` is 0 when the noise is not. Both
    are NaN where the estimate or its uncertainty is unknown.
    """
    if any(map(math.isnan, (*estimate, *uncertainty))):
        return math.nan, math.nan
    t_squared = student_t_quantile(level, uncertainty.dof) ** 2
    if math.isinf(t_squared):
        return 0.0, math.inf
    signal, noise = max(estimate.signal, 0.0), max(estimate.noise, 0.0)
    # The ends are the roots of a R^2 - 2 b R + c; their product is c / a.
    a = signal * signal - t_squared * uncertainty.signal_variance
    b = noise * signal - t_squared * uncertainty.covariance
    c = noise * noise - t_squared * uncertainty.noise_variance
    larger = b + math.sqrt(max(b * b - a * c, 0.0))
    low = c / larger if c > 0 and larger > 0 else 0.0
    return low, larger / a if a > 0 else math.inf
