"""Exponential averages of noise scale estimates, their errors, and what can be said from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from trainc.runtime.noise_scale.estimate import (
    UNDETERMINED,
    UNKNOWN,
    Estimate,
    Reading,
    Spread,
    ratio_interval,
)

Cause = Literal["alone", "not finite"]

# Nearer to one, a single estimate carries the whole average.
_ONE_ESTIMATE = 1e-9

_LONE = "one example a step: nothing to compare; give a step two samples or more"

# How much of the squared weight may lack a spread of its own before the scatter is taken instead.
_COVERED = 1e-6


class Averages:
    """Exponential averages of estimates, started at zero, with the sums that undo the start.

    With estimate i weighing a_i there are three groups of sums.
    Moments: a, a^2, a signal, a noise, a signal^2, a noise^2, a signal noise.
    Spreads, of the estimates that came with one: a^2, a^2 times their variances and covariance,
    a^4 / freedom.
    Counts: estimates, steps of one example, steps whose gradients were not finite.

    Estimates are taken for independent. The error of the averages is that of the spreads where
    every estimate has one, so it exists from the first on; else that of the estimates' scatter,
    from the second on, which counts a drift of the truth as noise.
    """

    MOMENTS, SPREADS, COUNTS = 7, 5, 3
    SIZE = MOMENTS + SPREADS + COUNTS

    def __init__(self) -> None:
        self.load([0.0] * self.SIZE)

    def add(self, estimate: Estimate, decay: float, spread: Spread | None = None) -> None:
        """Fold in an estimate; what was there keeps `decay` of its weight, in [0, 1).

        An estimate that is not finite is counted and changes no average; a spread that is not
        finite (two examples have none) is none.
        """
        signal, noise = estimate
        if not (math.isfinite(signal) and math.isfinite(noise)):
            self.skip("not finite")
            return
        if not 0 <= decay < 1:
            raise ValueError(
                f"decay = {decay:g}: what was there keeps a share in [0, 1) of its weight, else the "
                "estimate has none; did anything pass since the one before?"
            )
        fresh = 1 - decay
        new = (1.0, fresh, signal, noise, signal * signal, noise * noise, signal * noise)
        for i, value in enumerate(new):
            keep = decay * decay if i == 1 else decay
            self._moments[i] = keep * self._moments[i] + fresh * value
        self._add_spread(spread, decay)
        self._counts[0] += 1

    def _add_spread(self, spread: Spread | None, decay: float) -> None:
        new = (0.0,) * self.SPREADS
        if spread is not None and all(map(math.isfinite, spread[:3])) and spread.dof > 0:
            new = (1.0, spread.signal, spread.noise, spread.covariance, 1 / spread.dof)
        for i, value in enumerate(new):
            power = 4 if i == self.SPREADS - 1 else 2
            self._spreads[i] = decay**power * self._spreads[i] + (1 - decay) ** power * value

    def skip(self, cause: Cause) -> None:
        """Count a step that gave no estimate."""
        self._counts[{"alone": 1, "not finite": 2}[cause]] += 1

    @property
    def steps(self) -> int:
        """Return how many steps were seen, with and without an estimate."""
        return int(sum(self._counts))

    @property
    def estimates(self) -> int:
        """Return how many steps gave an estimate."""
        return int(self._counts[0])

    @property
    def broken(self) -> int:
        """Return how many steps had gradients that were not finite."""
        return int(self._counts[2])

    @property
    def weight(self) -> float:
        """Return the sum of the estimates' weights, 1 in the end."""
        return self._moments[0]

    @property
    def independent(self) -> float:
        """Return how many estimates of equal weight would be as sure as these."""
        return self._moments[0] ** 2 / self._moments[1] if self._moments[1] else 0.0

    @property
    def estimate(self) -> Estimate:
        """Return the averages, unbiased from the first estimate on; NaN before it."""
        weight, _, signal, noise, *_ = self._moments
        return Estimate(signal / weight, noise / weight) if weight else UNDETERMINED

    @property
    def spread(self) -> Spread:
        """Return how sure the averages are; NaN where nothing tells."""
        covered, squared = self._spreads[0], self._moments[1]
        if covered and covered >= (1 - _COVERED) * squared:
            return self._own_spread()
        return self._scatter()

    def scale(self, errors: float = 0.0) -> float:
        """Return the ratio of the averages; NaN while the signal is not `errors` errors above 0."""
        estimate = self.estimate
        if errors and not estimate.signal > errors * math.sqrt(self.spread.signal):
            return math.nan
        return estimate.scale

    def error(self) -> float:
        """Return the ratio's standard error by the delta method; NaN where nothing tells.

        It serves a signal far from zero; `interval` serves any.
        """
        ratio = self.estimate.scale
        var_signal, var_noise, covariance, _ = self.spread
        variance = var_noise - 2 * ratio * covariance + ratio * ratio * var_signal
        if math.isnan(variance):
            return math.nan
        return math.sqrt(max(variance, 0.0)) / self.estimate.signal

    def interval(self, level: float = 0.9) -> tuple[float, float]:
        """Return low and high of the noise scale: see `ratio_interval`; NaN where nothing tells."""
        return ratio_interval(self.estimate, self.spread, level)

    def reading(
        self, level: float = 0.9, errors: float = 0.0, unit: str = "samples", lone: str = _LONE
    ) -> Reading:
        """Return the noise scale with its interval, or why there is none and what would help.

        `errors` is how many standard errors the signal must be above zero; `unit` names what an
        example is, `lone` says why a step had nothing to compare.
        """
        if not self._moments[0]:
            return Reading(math.nan, reason=self._nothing(lone))
        low, high = self.interval(level)
        scale = self.scale(errors)
        if not math.isnan(scale):
            return Reading(scale, low, high)
        return Reading(math.nan, low, high, self._why(low, high, errors, unit))

    def _nothing(self, lone: str) -> str:
        """Return why no step gave an estimate."""
        _, alone, broken = (int(count) for count in self._counts)
        if broken:
            return f"gradients were not finite in {broken} of {self.steps} steps"
        if alone:
            return lone
        return "no step yet"

    def _why(self, low: float, high: float, errors: float, unit: str) -> str:
        """Return which part is not above zero, after how many steps, and the bound that leaves."""
        estimate, count = self.estimate, int(self._counts[0])
        after = f"after {count} step{'s' * (count != 1)}"
        if not estimate.signal > 0:
            return f"|G|^2 is not above zero {after}: {_bound('at least', low, unit)}"
        if not estimate.noise > 0:
            return f"tr(Sigma) is not above zero {after}: {_bound('at most', high, unit)}"
        if math.isnan(estimate.scale):
            return f"tr(Sigma) / |G|^2 is too large for a number {after}"
        margin = f"|G|^2 is not {errors:g} standard errors above zero {after}"
        return f"{margin}: {_bound('at least', low, unit)}"

    def _own_spread(self) -> Spread:
        """Return the error from the estimates' own spreads, with freedom by Satterthwaite's rule."""
        weight, covered = self._moments[0], self._spreads[0]
        _, signal, noise, covariance, fourth = self._spreads
        dof = covered * covered / fourth if fourth else math.inf
        square = weight * weight
        return Spread(signal / square, noise / square, covariance / square, dof)

    def _scatter(self) -> Spread:
        """Return the error from the scatter of the estimates; NaN before two."""
        weight, squared, signal, noise, signal2, noise2, product = self._moments
        share = squared / weight**2 if weight else 1.0
        if share > 1 - _ONE_ESTIMATE:
            return UNKNOWN
        # Bessel's correction 1 / (1 - share) for one estimate, times share for their weighted mean.
        factor = share / (1 - share)
        signal, noise = signal / weight, noise / weight
        return Spread(
            max(signal2 / weight - signal * signal, 0.0) * factor,
            max(noise2 / weight - noise * noise, 0.0) * factor,
            (product / weight - signal * noise) * factor,
            1 / share - 1,
        )

    def state(self) -> list[float]:
        """Return what `load` restores, `SIZE` numbers."""
        return [*self._moments, *self._spreads, *self._counts]

    def load(self, state: Sequence[float]) -> None:
        """Restore what `state` gave."""
        if len(state) != self.SIZE:
            raise ValueError(
                f"averages are {self.SIZE} numbers, not {len(state)}: another version of trainc "
                "wrote them; resume with that one, or start the measurement anew"
            )
        values = [float(value) for value in state]
        spreads = self.MOMENTS + self.SPREADS
        self._moments = values[: self.MOMENTS]
        self._spreads = values[self.MOMENTS : spreads]
        self._counts = values[spreads:]


def _bound(words: str, value: float, unit: str) -> str:
    """Return `words value unit` where the value says something, else what would help."""
    if 0 < value < math.inf:
        return f"{words} {value:.3g} {unit}"
    return f"average over more steps, or put more {unit} into one"
