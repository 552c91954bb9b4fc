"""What the noise scale of the norm layers says about that of the whole model, measured.

The two are nearly proportional (Gray et al. 2024, arXiv 2411.00999), by a factor that differs
between models and drifts in a run, so it is measured during the run: now and then all layers are
measured along with the norm layers, on the same examples, and the relation is kept with its error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from trainc.runtime.noise_scale.averages import Averages
from trainc.runtime.noise_scale.estimate import Estimate, Reading, Spread, ratio_interval


class Calibration:
    """Regression of the whole model's noise scale on that of the norm layers, over a fading past.

    It is one for either part, |G|^2 and tr(Sigma): the line through the origin whose slope is the
    ratio of the averages, which is least squares with weights 1 / x. The noise scale's slope is the
    quotient of the two slopes, so it, too, is one of averages: never an average of ratios, and no
    single measurement need be determined. What a measurement weighs, and how fast it fades, is what
    the noise scale that the slope is applied to does with its own estimates (`add`): both then lag
    behind by the same. An intercept would change nothing: any weighted line runs through the means
    of its points, and those means are where it is read.

    Measurements are independent, so their scatter about the two lines gives the slope's error, to
    first order in the parts: common noise and a common trend of both noise scales cancel. Noise
    falls mostly on the denominator, the whole model's |G|^2, so 1 / slope is taken for Gaussian:
    where that is not significantly above zero, nothing bounds the slope.
    """

    CROSS = 4
    """Sums of weighted products: norms' |G|^2, then tr(Sigma), by the total's |G|^2 and tr(Sigma)."""
    SIZE = 2 * Averages.SIZE + CROSS

    def __init__(self) -> None:
        self.norms, self.total = Averages(), Averages()
        self._cross: list[float] = []
        self.load([0.0] * self.SIZE)

    def add(self, norms: Estimate, total: Estimate, decay: float) -> None:
        """Fold in what one measurement found for the norm layers and, on the same examples, for all.

        What was there keeps `decay` of its weight, in [0, 1). Where one estimate is not finite the
        pair is counted and changes nothing.
        """
        if not all(map(math.isfinite, (*norms, *total))):
            self.norms.skip("not finite")
            self.total.skip("not finite")
            return
        self.norms.add(norms, decay)
        self.total.add(total, decay)
        new = [x * y for x in norms for y in total]
        self._cross = [
            decay * old + (1 - decay) * one for old, one in zip(self._cross, new, strict=True)
        ]

    @property
    def points(self) -> int:
        """Return how many measurements were folded in."""
        return self.norms.estimates

    @property
    def independent(self) -> float:
        """Return how many measurements of equal weight would be as sure as these."""
        return self.norms.independent

    def slope(self, level: float = 0.9) -> Reading:
        """Return what the total noise scale is in multiples of that of the norm layers.

        Undetermined while nothing bounds it from above; `low` may say something even then.
        """
        return self._read(1.0, 0.0, level)

    def predict(self, norms: float, level: float = 0.9, error: float = 0.0) -> Reading:
        """Return the total noise scale that goes with `norms`, that of the norm layers.

        The interval holds the slope's error and `error`, the standard error of `norms`. Undetermined
        while nothing bounds it from above.
        """
        if not (norms > 0 and math.isfinite(norms)):
            return Reading(math.nan, reason="the noise scale of the norm layers is undetermined")
        return self._read(norms, error, level)

    @property
    def correlation(self) -> float:
        """Return how measurements of the two noise scales go together, first order; NaN before two.

        That is the correlation of x's and y's deviations, tr(Sigma) / mean - |G|^2 / mean each.
        """
        parts = self._variances()
        if parts is None or not (parts[0] > 0 and parts[1] > 0):
            return math.nan
        return max(-1.0, min(1.0, parts[2] / math.sqrt(parts[0] * parts[1])))

    def _read(self, norms: float, error: float, level: float) -> Reading:
        """Return slope times `norms`."""
        parts, (x, y) = self._variances(), (self.norms.scale(), self.total.scale())
        if parts is None or math.isnan(x) or math.isnan(y):
            return Reading(math.nan, reason=self._why())
        variance = max(parts[0] + parts[1] - 2 * parts[2], 0.0) + (error / norms) ** 2
        inverse = Spread(variance, 0.0, 0.0, self.independent - 1)
        low, high = ratio_interval(Estimate(1.0, 1.0), inverse, level)
        scale = norms * y / x
        if not math.isfinite(high):
            return Reading(math.nan, scale * low, math.inf, self._why())
        return Reading(scale, scale * low, scale * high)

    def _variances(self) -> tuple[float, float, float] | None:
        """Return variances of log norms and log total, first order, and their covariance.

        Those are of the averages' ratios; None before two measurements, or where an average is zero.
        """
        cross = self._covariances()
        means = [*self.norms.estimate, *self.total.estimate]
        if cross is None or not all(means):
            return None
        # tr(Sigma) counts with its sign, |G|^2 against it.
        ss, sn, ns, nn = (c / x / y for c, (x, y) in zip(cross, _pairs(means), strict=True))
        x, y = (_variance(averages) for averages in (self.norms, self.total))
        return x, y, ss + nn - sn - ns

    def _covariances(self) -> list[float] | None:
        """Return the covariances of the averages, norms' parts by the total's; None before two."""
        share = 1 / self.independent if self.points else 1.0
        if self.points < 2 or not share < 1:
            return None
        weight, means = self.norms.weight, [*self.norms.estimate, *self.total.estimate]
        return [
            (product / weight - x * y) * share / (1 - share)
            for product, (x, y) in zip(self._cross, _pairs(means), strict=True)
        ]

    def _why(self) -> str:
        """Return why there is no slope, and what would help."""
        points, of = self.points, self.norms.steps
        if not of:
            return "no calibration yet"
        if points < 2:
            return (
                f"{points} of {of} calibrations had finite gradients to compare, a slope needs two"
            )
        for averages, what in ((self.norms, "measured layers"), (self.total, "whole model")):
            for part, name in zip(averages.estimate, ("|G|^2", "tr(Sigma)"), strict=True):
                if not part > 0:
                    return f"{name} of the {what} is not above zero over {points} calibrations"
        return f"{points} calibrations, too few or too noisy to bound it from above"

    def state(self) -> list[float]:
        """Return what `load` restores, `SIZE` numbers."""
        return [*self.norms.state(), *self.total.state(), *self._cross]

    def load(self, state: Sequence[float]) -> None:
        """Restore what `state` gave."""
        if len(state) != self.SIZE:
            raise ValueError(
                f"a calibration is {self.SIZE} numbers, not {len(state)}: another version of trainc "
                "wrote them; resume with that one, or start the calibration anew"
            )
        size = Averages.SIZE
        self.norms.load(state[:size])
        self.total.load(state[size : 2 * size])
        self._cross = [float(value) for value in state[2 * size :]]


def _variance(averages: Averages) -> float:
    """Return the variance of the logarithm of a ratio of averages, first order."""
    (signal, noise), spread = averages.estimate, averages.spread
    return (
        spread.noise / noise / noise
        - 2 * spread.covariance / noise / signal
        + spread.signal / signal / signal
    )


def _pairs(means: Sequence[float]) -> list[tuple[float, float]]:
    """Return the norms' |G|^2, then tr(Sigma), with the total's |G|^2 and tr(Sigma)."""
    return [(x, y) for x in means[:2] for y in means[2:]]
