"""The quantile of Student's t distribution, for the ends of intervals."""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist

# From here on the expansion of Student's quantile around the normal one is exact to 1e-6.
_EXPANSION_DOF = 100


def student_t_quantile(level: float, dof: float) -> float:
    """Return the two-sided quantile: |t| of Student's distribution stays below it with probability `level`.

    `dof` is rounded down to a whole number, which errs to the wide side; below one there is no
    such bound: infinity. Raises ValueError for a level outside (0, 1).
    """
    if not 0 < level < 1:
        raise ValueError(f"level = {level}: expected a probability between 0 and 1, such as 0.9")
    if not dof >= 1:
        return math.inf
    if dof < _EXPANSION_DOF:
        return _quantile_by_bisection(level, int(dof))
    return _quantile_by_expansion(level, dof)


def _quantile_by_expansion(level: float, dof: float) -> float:
    """Return Student's quantile by its expansion in 1 / dof (Abramowitz & Stegun 26.7.5)."""
    z = NormalDist().inv_cdf(0.5 + level / 2)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / dof + second / dof**2 + third / dof**3


@lru_cache(maxsize=4096)
def _quantile_by_bisection(level: float, dof: int) -> float:
    """Return Student's quantile by bisection: with t = sqrt(dof) tan(x), x has density cos^(dof - 1)."""
    low, high = 0.0, math.pi / 2
    wanted = level * _cosine_power_integral(dof - 1, high)
    for _ in range(60):
        middle = (low + high) / 2
        if _cosine_power_integral(dof - 1, middle) < wanted:
            low = middle
        else:
            high = middle
    return math.sqrt(dof) * math.tan(low)


def _cosine_power_integral(power: int, x: float) -> float:
    """Return the integral of cos^power from 0 to x, by parts down to power 1 or 0."""
    cos, sin = math.cos(x), math.sin(x)
    total = sin if power % 2 else x
    for k in range(2 + power % 2, power + 1, 2):
        total = (cos ** (k - 1) * sin + (k - 1) * total) / k
    return total
