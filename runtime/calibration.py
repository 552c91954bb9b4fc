"""What the noise scale of the norm layers says about that of the whole model, measured.

The two are nearly proportional (Gray et al. 2024, arXiv 2411.00999), by a factor that differs
between models, so it is measured during the run: now and then all layers are measured along with
the norm layers, on the same examples, and the relation is kept with its error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from trainc.runtime.averages import Averages
from trainc.runtime.estimates import Estimate, Reading, student


class Line(NamedTuple):
    """total = intercept + slope * norms; `error`, `low` and `high` are of the slope.

    All are NaN before two pairs, the last three before enough of them.
    """

    slope: float
    intercept: float
    error: float
    low: float
    high: float


class Calibration:
    """Averages pairs of estimates (norm layers, all layers) and keeps a regression of their ratios.

    A single pair's ratio is mostly noise, so a point of the regression is the pair of running
    ratios after each measurement, where both are determined. Points d apart then share decay^d of
    what they are made of; errors and degrees of freedom count them as the number of independent
    points that would be as sure, n^2 / sum_kl decay^|k - l|.

    The regression takes x for exact. Noise in it flattens the slope, by Var(noise) / mean x^2 for
    the line through the origin, which is one more reason to average before.

    The regression's sums are those of the run, all points alike: number, means of norms x and total
    y, sums of their squared deviations and product, and the two sums of shared weights.
    """

    SIZE = 2 * Averages.SIZE + 9

    def __init__(self) -> None:
        self.norms, self.total = Averages(), Averages()
        self.load([0.0] * self.SIZE)

    def add(self, norms: Estimate, total: Estimate, decay: float) -> None:
        """Fold in what one measurement found for the norm layers and, on the same examples, for all.

        What was there keeps `decay` of its weight in the averages, in [0, 1): 0 takes the estimates
        for averages already, independent of each other. Where one is not finite the pair is counted
        and changes nothing.
        """
        self._measured += 1
        if not all(map(math.isfinite, (*norms, *total))):
            self.norms.skip("not finite")
            self.total.skip("not finite")
            return
        self.norms.add(norms, decay)
        self.total.add(total, decay)
        # A measurement ages the points before it, also when it makes none.
        self._shared *= decay
        x, y = self.norms.scale(), self.total.scale()
        if not (math.isnan(x) or math.isnan(y)):
            self._add_point(x, y)

    def _add_point(self, x: float, y: float) -> None:
        self._overlap += 1 + 2 * self._shared
        self._shared += 1
        self._count += 1
        from_x, from_y = x - self._x, y - self._y
        self._x += from_x / self._count
        self._y += from_y / self._count
        self._xx += from_x * (x - self._x)
        self._yy += from_y * (y - self._y)
        self._xy += from_x * (y - self._y)

    @property
    def points(self) -> int:
        """Return of how many measurements both averaged ratios were determined."""
        return int(self._count)

    @property
    def independent(self) -> float:
        """Return how many independent points are as sure as these."""
        return self._count**2 / self._overlap if self._count else 0.0

    @property
    def correlation(self) -> float:
        """Return the correlation of the two noise scales over the run; NaN before two points."""
        spread = self._xx * self._yy
        return max(-1.0, min(1.0, self._xy / math.sqrt(spread))) if spread > 0 else math.nan

    def through_origin(self, level: float = 0.9) -> Line:
        """Return the least-squares line total = slope * norms."""
        if self.points < 2:
            return _NO_LINE
        xx, xy, yy = self._about_zero()
        slope = xy / xx
        error = math.sqrt(self._variance(yy - slope * xy, 1) / xx)
        return _line(slope, 0.0, error, student(level, self.independent - 1))

    def with_intercept(self, level: float = 0.9) -> Line:
        """Return the least-squares line total = intercept + slope * norms; none where norms stood."""
        if self.points < 2 or not self._xx > 0:
            return _NO_LINE
        slope = self._xy / self._xx
        error = math.sqrt(self._variance(self._yy - slope * self._xy, 2) / self._xx)
        return _line(slope, self._y - slope * self._x, error, student(level, self.independent - 2))

    def predict(
        self, norms: float, level: float = 0.9, error: float = 0.0, intercept: bool = False
    ) -> Reading:
        """Return the total noise scale that goes with `norms`, that of the norm layers.

        The interval is that of one more point: scatter about the line, error of the line, and
        `error`, the standard error of `norms`. It runs to infinity while too few independent points
        tell about the scatter.
        """
        line = self.with_intercept(level) if intercept else self.through_origin(level)
        if math.isnan(line.slope):
            return Reading(math.nan, reason=self._why())
        if not (norms > 0 and math.isfinite(norms)):
            return Reading(math.nan, reason="the noise scale of the norm layers is undetermined")
        scale = line.intercept + line.slope * norms
        if not scale > 0:
            return Reading(math.nan, reason=f"the line gives {scale:.3g} at {norms:.3g}")
        freedom = self.independent - (2 if intercept else 1)
        margin = student(level, freedom) * self._doubt(norms, error, line, intercept)
        if not math.isfinite(margin):
            return Reading(scale, 0.0, math.inf)
        return Reading(scale, max(scale - margin, 0.0), scale + margin)

    def _doubt(self, norms: float, error: float, line: Line, intercept: bool) -> float:
        """Return the standard error of one more point at `norms`; NaN where nothing tells."""
        xx, xy, yy = self._about_zero()
        if intercept:
            scatter = self._variance(self._yy - line.slope * self._xy, 2)
            leverage = 1 / self._count + (norms - self._x) ** 2 / self._xx
        else:
            scatter = self._variance(yy - line.slope * xy, 1)
            leverage = norms * norms / xx
        # `_variance` is that of the mean of points alike; one point's is smaller by their overlap.
        one = scatter * self.independent / self._count
        return math.sqrt(one + scatter * leverage + (line.slope * error) ** 2)

    def _about_zero(self) -> tuple[float, float, float]:
        """Return the sums of x^2, x y and y^2."""
        n, x, y = self._count, self._x, self._y
        return self._xx + n * x * x, self._xy + n * x * y, self._yy + n * y * y

    def _variance(self, residual: float, coefficients: int) -> float:
        """Return a point's scatter about a line, times n / independent; NaN without freedom.

        Of the residual squares' mean a share of coefficients / independent went into the line.
        """
        independent = self.independent
        if not independent > coefficients:
            return math.nan
        return max(residual, 0.0) / (independent - coefficients)

    def _why(self) -> str:
        """Return why there is no line."""
        if not self._measured:
            return "no calibration yet"
        both = f"in {self.points} of {int(self._measured)} calibrations both noise scales were determined"
        if self.points < 2:
            return f"{both}, a slope needs two"
        return (
            f"{both}, but that of the norm layers never changed: take the line through the origin"
        )

    def state(self) -> list[float]:
        """Return what `load` restores, `SIZE` numbers."""
        sums = [self._count, self._x, self._y, self._xx, self._yy, self._xy]
        more = [self._shared, self._overlap, self._measured]
        return [*self.norms.state(), *self.total.state(), *sums, *more]

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
        sums = [float(value) for value in state[2 * size :]]
        self._count, self._x, self._y, self._xx, self._yy, self._xy = sums[:6]
        self._shared, self._overlap, self._measured = sums[6:]


_NO_LINE = Line(math.nan, math.nan, math.nan, math.nan, math.nan)


def _line(slope: float, intercept: float, error: float, t: float) -> Line:
    """Return the line with its slope's interval, all real numbers where nothing bounds it."""
    margin = t * error
    if not math.isfinite(margin):
        return Line(slope, intercept, error, -math.inf, math.inf)
    return Line(slope, intercept, error, slope - margin, slope + margin)
