"""How much of a spread of figures is more than their noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

# The quantile of the normal distribution at 99 %.
_NORMAL = 2.3263478740408408


def spread_gain(figures: Sequence[float], noise: Sequence[float]) -> float:
    """Return how much of the differences of figures to follow, from 0, where noise explains them, to 1.

    `noise` is the standard deviation of each of the m `figures`, above 0. Cochran's Q is sum((figure - mean)^2 /
    noise^2), where the mean has the weights 1 / noise^2. Where figures differ by noise alone, Q follows the
    chi-squared distribution with m - 1 degrees of freedom. The gain is max(0, 1 - c / Q), where c is the 99 % quantile
    of that, by the formula of Wilson and Hilferty (1931). It is the statistic I^2 of Higgins and Thompson (2002),
    which has m - 1 in place of c. It is 0 for less than two figures. Raises ValueError for noise that is not above 0,
    and for another number of it.
    """
    if len(figures) != len(noise) or not all(0 < sd < math.inf for sd in noise):
        raise ValueError(
            f"{len(figures)} figures, noise = {[*noise]}: expected a standard deviation above 0 for each figure"
        )
    if len(figures) < 2:
        return 0.0
    weights = [1 / sd**2 for sd in noise]
    mean = math.fsum(w * x for w, x in zip(weights, figures, strict=True)) / math.fsum(weights)
    q = math.fsum(w * (x - mean) ** 2 for w, x in zip(weights, figures, strict=True))
    least = chi_squared(len(figures) - 1)
    return 1 - least / q if q > least else 0.0


def chi_squared(degrees: int) -> float:
    """Return the 99 % quantile of the chi-squared distribution, within 2 % (Wilson and Hilferty 1931)."""
    part = 2 / (9 * degrees)
    return float(degrees * (1 - part + _NORMAL * math.sqrt(part)) ** 3)


def noise_of_means(
    noise: Mapping[str, float], members: Mapping[str, Sequence[str]]
) -> dict[str, float]:
    """Return the standard deviation of each unit's mean over those of its parts that have a figure."""
    found = {unit: [noise[n] for n in names if n in noise] for unit, names in members.items()}
    return {
        unit: math.sqrt(math.fsum(sd**2 for sd in values)) / len(values)
        for unit, values in found.items()
        if values
    }
