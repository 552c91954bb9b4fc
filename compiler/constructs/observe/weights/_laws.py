"""Laws that a norm may follow in time, and their fits by least squares, from running sums."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from trainc.runtime.storage.form import Count, Form, Number

LAWS: dict[str, Callable[[float], float]] = {
    "sqrt": math.sqrt,
    "linear": float,
    "log": math.log,
    "root4": lambda t: float(t**0.25),
}
"""Laws as functions of t, the number of updates."""
POINTS = 3
"""A line fits two points exactly, so that a fit needs three."""
LEVEL = 0.95
"""How often an interval of a slope holds the true one, where its assumptions hold."""


@dataclass(slots=True)
class Fit:
    """Least squares of y = a + b x: running means, sums of squares and products around them, and of neighbours.

    `lag_*` are sums of products of a point and the one before it, both taken from the first point.
    """

    count: int = 0
    mean_x: float = 0.0
    mean_y: float = 0.0
    xx: float = 0.0
    yy: float = 0.0
    xy: float = 0.0
    first_x: float = 0.0
    first_y: float = 0.0
    last_x: float = 0.0
    last_y: float = 0.0
    lag_xx: float = 0.0
    lag_xy: float = 0.0
    lag_yy: float = 0.0

    def add(self, x: float, y: float) -> None:
        """Add one point (Welford's update)."""
        if not self.count:
            self.first_x, self.first_y = x, y
        else:
            u, v = x - self.first_x, y - self.first_y
            last_u, last_v = self.last_x - self.first_x, self.last_y - self.first_y
            self.lag_xx += u * last_u
            self.lag_xy += u * last_v + v * last_u
            self.lag_yy += v * last_v
        self.last_x, self.last_y = x, y
        self.count += 1
        dx, dy = x - self.mean_x, y - self.mean_y
        self.mean_x += dx / self.count
        self.mean_y += dy / self.count
        self.xx += dx * (x - self.mean_x)
        self.yy += dy * (y - self.mean_y)
        self.xy += dx * (y - self.mean_y)

    @property
    def r2(self) -> float | None:
        """Return the fraction of y's variance that the line explains; None with too few or equal points."""
        spread = self.xx * self.yy
        return min(1.0, self.xy**2 / spread) if self.count >= POINTS and spread > 0 else None

    @property
    def slope(self) -> float:
        """Return b; there are points of two x."""
        return self.xy / self.xx

    @property
    def intercept(self) -> float:
        """Return a."""
        return self.mean_y - self.slope * self.mean_x

    @property
    def residual(self) -> float:
        """Return the sum of squared distances of the points from the line."""
        return max(0.0, self.yy - self.xy**2 / self.xx)

    @property
    def correlation(self) -> float:
        """Return that of the residuals of neighbouring points, 0 where it is negative."""
        b, rest = self.slope, self.residual
        if rest <= 1e-12 * self.yy:  # rounding
            return 0.0
        a = self.intercept + b * self.first_x - self.first_y
        last = self.last_y - self.first_y - b * (self.last_x - self.first_x)
        products = self.lag_yy - b * self.lag_xy + b * b * self.lag_xx
        return min(1.0, max(0.0, (products - (self.count + 1) * a * a + a * last) / rest))

    @property
    def interval(self) -> tuple[float, float] | None:
        """Return the ends of the slope's interval; None where there are too few independent points.

        Points count for n (1 - r) / (1 + r) independent ones, where r is `correlation`; the quantile is Student's.
        """
        from trainc.runtime.report.student_t import student_t_quantile

        if self.r2 is None:
            return None
        r = self.correlation
        freedom = self.count * (1 - r) / (1 + r) - 2
        if freedom < 1:
            return None
        error = math.sqrt(self.residual / freedom / self.xx)
        apart = student_t_quantile(LEVEL, freedom) * error
        return self.slope - apart, self.slope + apart


class Fits:
    """The fits of one measured number by several laws."""

    def __init__(self, laws: Sequence[str]) -> None:
        self.of = {law: Fit() for law in laws}

    def add(self, t: float, y: float) -> None:
        """Add what was measured after `t` updates, 1 or more; a number that is not finite is left out."""
        if math.isfinite(y):
            for law, fit in self.of.items():
                fit.add(LAWS[law](t), y)

    @property
    def r2(self) -> dict[str, float]:
        """Return each law's r2, empty before there are three points."""
        return {law: r2 for law, fit in self.of.items() if (r2 := fit.r2) is not None}

    @property
    def best(self) -> str | None:
        """Return the law of the largest r2; None before there are three points."""
        found = self.r2
        return max(found, key=found.__getitem__) if found else None

    def signals(self) -> dict[str, float]:
        """Return `fit`, the r2 of the best law, with its `slope` and the ends of that; empty before three points."""
        if (best := self.best) is None:
            return {}
        fit = self.of[best]
        found = {"fit": self.r2[best], "slope": fit.slope}
        if (ends := fit.interval) is not None:
            found |= {"slope_low": ends[0], "slope_high": ends[1]}
        return found

    def summary(self) -> str:
        """Return the best fit in words, empty before there are three points."""
        if (best := self.best) is None:
            return ""
        return f", best fit {best} (r2 {self.r2[best]:.4f}, slope {slope_text(self.of[best])})"

    def state_dict(self) -> dict[str, Any]:
        return {f"fit/{law}/{n}": v for law, fit in self.of.items() for n, v in asdict(fit).items()}

    def state_form(self) -> dict[str, Form]:
        found: dict[str, Form] = {}
        for law in self.of:
            for name in asdict(Fit()):
                low = 0 if name in ("xx", "yy") else -math.inf
                found[f"fit/{law}/{name}"] = Count() if name == "count" else Number(low)
        return found

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave; without a state there are no points."""
        for law in self.of:
            self.of[law] = Fit(
                **{n: state[f"fit/{law}/{n}"] for n in asdict(Fit())} if state else {}
            )


def slope_text(fit: Fit) -> str:
    """Return a slope with its interval, where it has one."""
    ends = fit.interval
    return f"{fit.slope:.4g}" + ("" if ends is None else f" [{ends[0]:.4g}, {ends[1]:.4g}]")
