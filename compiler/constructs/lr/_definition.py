"""The definitions that policies on spectra are compared with, in plain float64."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

# The normal distribution's quantile at 99 %.
NORMAL = 2.3263478740408408
# Eigenvalues below this fraction of the largest are rounding.
RANK = 1e-12


def alpha_of(values: Iterable[float], fit: str, xmin_pos: float, convention: str) -> float:
    """Return the exponent of a spectrum: at a fixed place, or at the threshold with the least distance."""
    x = sorted(values)
    n = len(x)
    if fit != "median":
        x = [value for value in x if value > RANK * x[-1]]
        starts = near_peak(x) if fit == "peak" else range(len(x) - 1)
        return hill(x, min(starts, key=lambda i: distance(x, i)))
    if convention == "code":
        return hill(x, int(n / xmin_pos))
    k = int(n - n / xmin_pos)
    return 1 + k / math.fsum(math.log(value / x[n - k - 1]) for value in x[n - k :])


def figure_of(values: Sequence[float], alpha: float, metric: str | None) -> float:
    """Return a figure of a spectrum; all that follow from alpha and the shape are alpha here."""
    largest, total = max(values), math.fsum(values)
    if metric == "log_alpha":
        return alpha * math.log10(largest)
    if metric == "stable_rank":
        return total / largest
    if metric == "spectral_norm":
        return math.sqrt(largest)
    if metric == "entropy":
        parts = (value / total for value in values)
        return -math.fsum(p * math.log(p) for p in parts if p > 0) / math.log(len(values))
    return alpha


def hill(x: Sequence[float], i: int) -> float:
    """Return the exponent of the tail that begins at value number `i`."""
    return 1 + (len(x) - i) / math.fsum(math.log(value / x[i]) for value in x[i:])


def distance(x: Sequence[float], i: int) -> float:
    """Return the distance of Kolmogorov and Smirnov of the tail from the power law fitted to it."""
    alpha, n = hill(x, i), len(x) - i
    fitted = [1 - math.exp((1 - alpha) * math.log(value / x[i])) for value in x[i:]]
    return max(abs(y - j / n) for j, y in enumerate(fitted))


def near_peak(x: Sequence[float]) -> list[int]:
    """Return the thresholds between 0.95 and 1.5 of the left edge of the highest of 100 bins over log10."""
    low, high = math.log10(x[0]), math.log10(x[-1])
    counts = [0] * 100
    for value in x:
        counts[min(int((math.log10(value) - low) / (high - low) * 100), 99)] += 1
    edge = 10 ** (low + (high - low) * counts.index(max(counts)) / 100)
    return [i for i, value in enumerate(x[:-1]) if 0.95 * edge <= value <= 1.5 * edge]


def gain_of(levels: Mapping[str, float], noise: Mapping[str, float]) -> float:
    """Return 1 - c / Q, 0 where Q is below c, for units of one weight each."""
    weights = {name: noise[name] ** -2 for name in levels}
    mean = sum(weights[n] * levels[n] for n in levels) / sum(weights.values())
    q = sum(weights[n] * (levels[n] - mean) ** 2 for n in levels)
    m = len(levels) - 1
    c = m * (1 - 2 / (9 * m) + NORMAL * math.sqrt(2 / (9 * m))) ** 3
    return max(0.0, 1 - c / q)
