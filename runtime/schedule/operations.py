"""The operations of expressions: arithmetic, comparisons, mathematical functions and states of a number."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping


def _propagate_nan(pick: Callable[..., float]) -> Callable[..., float]:
    """Return `pick` with NaN where any argument is NaN."""
    return lambda *values: math.nan if any(map(math.isnan, values)) else pick(*values)


def divide(left: float, right: float) -> float:
    """Divide; by zero as IEEE 754 does: infinity of the sign of `left`, NaN for 0 / 0."""
    if right == 0:
        return math.nan if left == 0 or math.isnan(left) else math.copysign(math.inf, left)
    return left / right


def _everywhere(function: Callable[[float], float], at_zero: float) -> Callable[[float], float]:
    """Return `function` with NaN outside its domain, `at_zero` at 0 and infinity on overflow."""

    def call(x: float) -> float:
        try:
            return function(x) if x != 0 else at_zero
        except ValueError:
            return math.nan
        except OverflowError:
            return math.inf

    return call


MATHS: Mapping[str, Callable[..., float]] = {
    "min": _propagate_nan(min),
    "max": _propagate_nan(max),
    "sqrt": _everywhere(math.sqrt, 0.0),
    "log": _everywhere(math.log, -math.inf),
    "exp": _everywhere(math.exp, 1.0),
    "abs": abs,
}
ARITHMETIC: Mapping[str, Callable[[float, float], float]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": divide,
}
COMPARISONS: Mapping[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": lambda left, right: left < right or left > right,
}
STATES: Mapping[str, Callable[[float], bool]] = {
    "nan": math.isnan,
    "inf": math.isinf,
    "finite": math.isfinite,
}
