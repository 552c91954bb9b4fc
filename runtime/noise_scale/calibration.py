"""Calibration: predict the whole model's noise scale from that of a clause's layers, with an interval.

For norm layers the two are nearly proportional (Gray et al. 2024, arXiv 2411.00999), by a factor
that differs between models and drifts in a run. So it is measured during the run: now and then the
whole model is measured along with the clause's layers, on the same examples.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import product

from trainc.runtime.noise_scale.averages import Averages
from trainc.runtime.noise_scale.estimate import Estimate, IntervalEstimate, Uncertainty
from trainc.runtime.noise_scale.interval import ratio_interval


class Calibration:
    """Regression of the whole model's noise scale on that of the measured layers, with exponential forgetting.

    There is one regression for |G|^2 and one for tr(Sigma): the line through the origin whose slope
    is the ratio of the averages, which is least squares with weights 1 / x. The slope of the noise
    scale is the quotient of the two slopes. So it, too, is a ratio of averages and never an average
    of ratios, and a single calibration may be undetermined. A calibration has the weight and the
    decay that the estimates of the predicted noise scale have (`add`), so that both lag by the same.
    An intercept would change nothing: any weighted line runs through the means of its points, and
    those means are where it is read.

    Calibrations are independent, so their residuals from the two lines give the slope's standard
    error, to first order in the two parts: common noise and a common trend of both noise scales
    cancel. Noise falls mostly on the denominator, the whole model's |G|^2, so 1 / slope is taken for
    Gaussian: where that is not significantly above zero, the slope has no upper bound.
    """

    CROSS = 4
    """Sums of weighted products: measured layers' |G|^2, then tr(Sigma), by the whole model's two."""
    SIZE = 2 * Averages.SIZE + CROSS

    def __init__(self) -> None:
        self.measured, self.whole_model = Averages(), Averages()
        self._cross: list[float] = []
        self.load([0.0] * self.SIZE)

    def add(self, measured: Estimate, whole_model: Estimate, decay: float) -> None:
        """Add one calibration: the estimates of the measured layers and of all layers, on the same examples.

        The calibrations before it keep `decay` of their weight, in [0, 1). Where one estimate is
        not finite the pair is counted and changes nothing.
        """
        if not all(map(math.isfinite, (*measured, *whole_model))):
            self.measured.skip("not finite")
            self.whole_model.skip("not finite")
            return
        self.measured.add(measured, decay)
        self.whole_model.add(whole_model, decay)
        pairs = product(measured, whole_model)
        self._cross = [
            decay * old + (1 - decay) * (x * y)
            for old, (x, y) in zip(self._cross, pairs, strict=True)
        ]

    @property
    def count(self) -> int:
        """Return how many calibrations were added."""
        return self.measured.estimates

    @property
    def effective_count(self) -> float:
        """Return the effective number of calibrations, (sum a)^2 / sum a^2 of their weights (Kish)."""
        return self.measured.effective_count

    def slope(self, level: float = 0.9) -> IntervalEstimate:
        """Return the whole model's noise scale divided by that of the measured layers.

        Undetermined while it has no upper bound; `low` may be known even then.
        """
        return self._scaled_slope(1.0, 0.0, level)

    def predict(
        self, noise_scale: float, level: float = 0.9, standard_error: float = 0.0
    ) -> IntervalEstimate:
        """Return the whole model's noise scale where that of the measured layers is `noise_scale`.

        The interval accounts for the slope's error and for `standard_error`, that of `noise_scale`.
        Undetermined while it has no upper bound.
        """
        if not (noise_scale > 0 and math.isfinite(noise_scale)):
            reason = "the noise scale of the measured layers is undetermined"
            return IntervalEstimate(math.nan, reason=reason)
        return self._scaled_slope(noise_scale, standard_error, level)

    @property
    def correlation(self) -> float:
        """Return the correlation of the two noise scales over the calibrations; NaN before two.

        To first order: that of their deviations, tr(Sigma) / mean - |G|^2 / mean each.
        """
        moments = self._log_covariance()
        if moments is None or not (moments[0] > 0 and moments[1] > 0):
            return math.nan
        return max(-1.0, min(1.0, moments[2] / math.sqrt(moments[0] * moments[1])))

    def _scaled_slope(
        self, noise_scale: float, standard_error: float, level: float
    ) -> IntervalEstimate:
        """Return the slope times `noise_scale`."""
        moments = self._log_covariance()
        x, y = self.measured.noise_scale(), self.whole_model.noise_scale()
        if moments is None or math.isnan(x) or math.isnan(y):
            return IntervalEstimate(math.nan, reason=self._undetermined_reason())
        variance = max(moments[0] + moments[1] - 2 * moments[2], 0.0)
        variance += (standard_error / noise_scale) ** 2
        inverse = Uncertainty(variance, 0.0, 0.0, self.effective_count - 1)
        low, high = ratio_interval(Estimate(1.0, 1.0), inverse, level)
        value = noise_scale * y / x
        if not math.isfinite(high):
            return IntervalEstimate(math.nan, value * low, math.inf, self._undetermined_reason())
        return IntervalEstimate(value, value * low, value * high)

    def _log_covariance(self) -> tuple[float, float, float] | None:
        """Return the variances of the two noise scales' logarithms, to first order, and their covariance.

        None before two calibrations, or where an average is zero.
        """
        cross = self._cross_covariances()
        if cross is None or not all((*self.measured.estimate, *self.whole_model.estimate)):
            return None
        # tr(Sigma) counts with its sign, |G|^2 against it.
        ss, sn, ns, nn = (c / x / y for c, (x, y) in zip(cross, self._pairs(), strict=True))
        x, y = (_log_variance(averages) for averages in (self.measured, self.whole_model))
        return x, y, ss + nn - sn - ns

    def _cross_covariances(self) -> list[float] | None:
        """Return the covariances of the measured layers' averages with the whole model's; None before two."""
        share = 1 / self.effective_count if self.count else 1.0
        if self.count < 2 or not share < 1:
            return None
        weight = self.measured.weight
        return [
            (product / weight - x * y) * share / (1 - share)
            for product, (x, y) in zip(self._cross, self._pairs(), strict=True)
        ]

    def _pairs(self) -> Iterable[tuple[float, float]]:
        """Return the measured layers' |G|^2, then tr(Sigma), each with the whole model's two."""
        return product(self.measured.estimate, self.whole_model.estimate)

    def _undetermined_reason(self) -> str:
        """Return why the slope is undetermined."""
        count, tried = self.count, self.measured.steps
        if not tried:
            return "no calibration yet"
        if count < 2:
            return (
                f"a slope needs two calibrations with finite gradients; {count} of {tried} had them"
            )
        for averages, layers in (
            (self.measured, "measured layers"),
            (self.whole_model, "whole model"),
        ):
            for value, name in zip(averages.estimate, ("|G|^2", "tr(Sigma)"), strict=True):
                if not value > 0:
                    return f"{name} of the {layers} is not above zero over {count} calibrations"
        return f"{count} calibrations are too few or too noisy for an upper bound"

    def state(self) -> list[float]:
        """Return what `load` restores, `SIZE` numbers."""
        return [*self.measured.state(), *self.whole_model.state(), *self._cross]

    def load(self, state: Sequence[float]) -> None:
        """Restore what `state` gave; raises ValueError for another number of entries."""
        if len(state) != self.SIZE:
            raise ValueError(
                f"a saved calibration has {self.SIZE} numbers, not {len(state)}: another version of"
                " trainc saved it; resume with that version, or start a new run"
            )
        size = Averages.SIZE
        self.measured.load(state[:size])
        self.whole_model.load(state[size : 2 * size])
        self._cross = [float(value) for value in state[2 * size :]]


def _log_variance(averages: Averages) -> float:
    """Return the variance of the noise scale's logarithm, to first order."""
    (signal, noise), uncertainty = averages.estimate, averages.uncertainty
    return (
        uncertainty.noise_variance / noise / noise
        - 2 * uncertainty.covariance / noise / signal
        + uncertainty.signal_variance / signal / signal
    )
