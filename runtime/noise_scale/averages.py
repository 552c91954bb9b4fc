"""Exponential averages of noise scale estimates, with their standard errors and intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from trainc.runtime.noise_scale.estimate import (
    UNDETERMINED,
    UNKNOWN,
    Estimate,
    IntervalEstimate,
    Uncertainty,
)
from trainc.runtime.noise_scale.interval import ratio_interval

SkipCause = Literal["single", "not finite"]

# Nearer to one, a single estimate carries the whole average.
_ONE_ESTIMATE = 1e-9

# What part of the squared weight may come from estimates without an uncertainty of their own.
_WITHOUT_UNCERTAINTY = 1e-6


class Averages:
    """Exponential averages of estimates; they start at zero, and further sums correct for this start.

    With estimate i weighing a_i there are three groups of sums.
    Moments: a, a^2, a signal, a noise, a signal^2, a noise^2, a signal noise.
    Uncertainties, of the estimates that came with one: a^2, a^2 times their variances and
    covariance, a^4 / dof.
    Counts: estimates, steps of a single example, steps whose gradients were not finite.

    Estimates are taken for independent. The uncertainty of the averages is propagated from that of
    the estimates where each has one, so it exists from the first on; else it is that of the
    estimates' sample covariance, from the second on, which counts a drift of the truth as noise.
    """

    MOMENTS, UNCERTAINTIES, COUNTS = 7, 5, 3
    SIZE = MOMENTS + UNCERTAINTIES + COUNTS

    def __init__(self) -> None:
        self.load([0.0] * self.SIZE)

    def add(self, estimate: Estimate, decay: float, uncertainty: Uncertainty | None = None) -> None:
        """Add an estimate; earlier estimates keep the fraction `decay` of their weight, in [0, 1).

        An estimate that is not finite is counted and changes no average; an uncertainty that is not
        finite (two examples have none) is ignored. Raises ValueError for another `decay`.
        """
        signal, noise = estimate
        if not (math.isfinite(signal) and math.isfinite(noise)):
            self.skip("not finite")
            return
        if not 0 <= decay < 1:
            raise ValueError(
                f"decay = {decay:g}: expected a number in [0, 1), the part of their weight that"
                " earlier estimates keep; at 1 the clock has not moved since the last estimate"
            )
        fresh = 1 - decay
        new = (1.0, fresh, signal, noise, signal * signal, noise * noise, signal * noise)
        for i, value in enumerate(new):
            keep = decay * decay if i == 1 else decay
            self._moments[i] = keep * self._moments[i] + fresh * value
        self._add_uncertainty(uncertainty, decay)
        self._counts[0] += 1

    def _add_uncertainty(self, uncertainty: Uncertainty | None, decay: float) -> None:
        new = (0.0,) * self.UNCERTAINTIES
        if uncertainty and uncertainty.dof > 0 and all(map(math.isfinite, uncertainty[:3])):
            new = (1.0, *uncertainty[:3], 1 / uncertainty.dof)
        for i, value in enumerate(new):
            power = 4 if i == self.UNCERTAINTIES - 1 else 2
            self._uncertainties[i] = (
                decay**power * self._uncertainties[i] + (1 - decay) ** power * value
            )

    def skip(self, cause: SkipCause) -> None:
        """Count a step that gave no estimate: it had a single example, or its gradients were not finite."""
        self._counts[{"single": 1, "not finite": 2}[cause]] += 1

    @property
    def steps(self) -> int:
        """Return how many steps were counted, with and without an estimate."""
        return int(sum(self._counts))

    @property
    def estimates(self) -> int:
        """Return how many steps gave an estimate."""
        return int(self._counts[0])

    @property
    def non_finite_steps(self) -> int:
        """Return how many steps had gradients that were not finite."""
        return int(self._counts[2])

    @property
    def weight(self) -> float:
        """Return the sum of the estimates' weights, which tends to 1."""
        return self._moments[0]

    @property
    def effective_count(self) -> float:
        """Return the effective number of estimates, (sum a)^2 / sum a^2 (Kish)."""
        return self._moments[0] ** 2 / self._moments[1] if self._moments[1] else 0.0

    @property
    def estimate(self) -> Estimate:
        """Return the averages, unbiased from the first estimate on; NaN before it."""
        weight, _, signal, noise, *_ = self._moments
        return Estimate(signal / weight, noise / weight) if weight else UNDETERMINED

    @property
    def uncertainty(self) -> Uncertainty:
        """Return the variances and the covariance of the averages; NaN where they are unknown."""
        covered, squared = self._uncertainties[0], self._moments[1]
        if covered and covered >= (1 - _WITHOUT_UNCERTAINTY) * squared:
            return self._propagated_uncertainty()
        return self._sample_uncertainty()

    def noise_scale(self, errors: float = 0.0) -> float:
        """Return noise / signal of the averages; NaN unless the signal is `errors` standard errors above 0."""
        estimate = self.estimate
        if errors and not estimate.signal > errors * math.sqrt(self.uncertainty.signal_variance):
            return math.nan
        return estimate.noise_scale

    def standard_error(self) -> float:
        """Return the noise scale's standard error by the delta method; NaN where it is unknown.

        It holds for a signal far from zero; `interval` holds for any.
        """
        ratio = self.estimate.noise_scale
        signal_variance, noise_variance, covariance, _ = self.uncertainty
        variance = noise_variance - 2 * ratio * covariance + ratio * ratio * signal_variance
        if math.isnan(variance):
            return math.nan
        return math.sqrt(max(variance, 0.0)) / self.estimate.signal

    def interval(self, level: float = 0.9) -> tuple[float, float]:
        """Return low and high of the noise scale: see `ratio_interval`; NaN where they are unknown."""
        return ratio_interval(self.estimate, self.uncertainty, level)

    def interval_estimate(
        self,
        level: float = 0.9,
        errors: float = 0.0,
        unit: str = "samples",
        single_reason: str | None = None,
    ) -> IntervalEstimate:
        """Return the noise scale with its interval, or the reason why it is undetermined.

        `errors` is how many standard errors the signal must be above zero; `unit` is what an
        example is called, `single_reason` the reason where every step had a single example.
        """
        if not self._moments[0]:
            return IntervalEstimate(math.nan, reason=self._no_estimate_reason(unit, single_reason))
        low, high = self.interval(level)
        noise_scale = self.noise_scale(errors)
        if not math.isnan(noise_scale):
            return IntervalEstimate(noise_scale, low, high)
        reason = self._undetermined_reason(low, high, errors, unit)
        return IntervalEstimate(math.nan, low, high, reason)

    def _no_estimate_reason(self, unit: str, single_reason: str | None) -> str:
        """Return why there is no estimate from any step."""
        _, single, non_finite = (int(count) for count in self._counts)
        if non_finite:
            return f"gradients were not finite in {non_finite} of {self.steps} steps"
        if single:
            return single_reason or f"a noise scale needs two {unit} in a step; every step had one"
        return "no step yet"

    def _undetermined_reason(self, low: float, high: float, errors: float, unit: str) -> str:
        """Return the part that is not above zero, after how many steps, and the known bound."""
        estimate, count = self.estimate, int(self._counts[0])
        after = f"after {count} step{'s' * (count != 1)}"
        if not estimate.signal > 0:
            return f"|G|^2 is not above zero {after}: {_bound('at least', low, unit)}"
        if not estimate.noise > 0:
            return f"tr(Sigma) is not above zero {after}: {_bound('at most', high, unit)}"
        if math.isnan(estimate.noise_scale):
            return f"tr(Sigma) / |G|^2 is too large for a floating-point number {after}"
        margin = f"|G|^2 is not {errors:g} standard errors above zero {after}"
        return f"{margin}: {_bound('at least', low, unit)}"

    def _propagated_uncertainty(self) -> Uncertainty:
        """Return the uncertainty from those of the estimates, with Welch-Satterthwaite degrees of freedom."""
        weight, covered = self._moments[0], self._uncertainties[0]
        _, signal, noise, covariance, fourth = self._uncertainties
        dof = covered * covered / fourth if fourth else math.inf
        square = weight * weight
        return Uncertainty(signal / square, noise / square, covariance / square, dof)

    def _sample_uncertainty(self) -> Uncertainty:
        """Return the uncertainty from the sample covariance of the estimates; NaN before two."""
        weight, squared, signal, noise, signal2, noise2, product = self._moments
        share = squared / weight**2 if weight else 1.0
        if share > 1 - _ONE_ESTIMATE:
            return UNKNOWN
        # Bessel's correction 1 / (1 - share) for one estimate, times share for their weighted mean.
        factor = share / (1 - share)
        signal, noise = signal / weight, noise / weight
        return Uncertainty(
            max(signal2 / weight - signal * signal, 0.0) * factor,
            max(noise2 / weight - noise * noise, 0.0) * factor,
            (product / weight - signal * noise) * factor,
            1 / share - 1,
        )

    def state(self) -> list[float]:
        """Return what `load` restores, `SIZE` numbers."""
        return [*self._moments, *self._uncertainties, *self._counts]

    def load(self, state: Sequence[float]) -> None:
        """Restore what `state` gave; raises ValueError for numbers that it never gives."""
        if len(state) != self.SIZE:
            raise ValueError(
                f"saved averages of a noise scale have {self.SIZE} numbers, not {len(state)}: another"
                " version of trainc saved them; resume with that version, or start a new run"
            )
        values = [float(value) for value in state]
        counts = self.MOMENTS + self.UNCERTAINTIES
        _check_sums(values[:4], values[self.MOMENTS], values[counts:])
        self._moments = values[: self.MOMENTS]
        self._uncertainties = values[self.MOMENTS : counts]
        self._counts = values[counts:]


def _check_sums(moments: Sequence[float], covered: float, counts: Sequence[float]) -> None:
    """Raise ValueError for sums of weights, of estimates, or counts, that no estimates lead to."""
    weight, squared, *sums = moments
    above = 1 + 1e-6  # what rounding may add
    if not (
        0 <= weight <= above
        and 0 <= squared <= above * weight * weight
        and (squared > 0) == (weight > 0)
        and 0 <= covered <= above * squared
        and all(map(math.isfinite, sums))
        and all(count >= 0 and count.is_integer() for count in counts)
    ):
        raise ValueError(
            f"no estimates lead to averages of a noise scale with weight {weight:g}, sums"
            f" {', '.join(f'{value:g}' for value in (squared, *sums, covered))} and counts"
            f" {', '.join(f'{count:g}' for count in counts)}: the state is damaged"
        )


def _bound(words: str, value: float, unit: str) -> str:
    """Return `words value unit` if the value is a bound, else how to get one."""
    if 0 < value < math.inf:
        return f"{words} {value:.3g} {unit}"
    return f"average over more steps, or put more {unit} into a step"
