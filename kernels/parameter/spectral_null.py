"""The null of alpha: what it is for a weight whose entries are independent, so that only its shape speaks.

For an iid matrix with sides n <= m the eigenvalues follow the law of Marchenko and Pastur with ratio q = n / m,
whatever the distribution of its entries (Bai and Silverstein, Spectral Analysis of Large Dimensional Random
Matrices, 2010). Alpha over a fraction of them then is a function of q alone. It spreads around that by c(q) / n:
sums over n eigenvalues of a random matrix vary by O(1), not by O(sqrt(n)).
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from trainc.kernels.parameter.spectrum import Convention, Hill, count

SPREAD = 2.1
"""The standard deviation of alpha over (null - 1) / (n sqrt(tail)), measured on Gaussian matrices."""
# Steps of the integral; its integrand is smooth in the angle, so the error is below 1e-7.
STEPS = 1 << 14


def null_alpha(q: float, tail: float = 0.5) -> float:
    """Return the exponent of a large iid matrix with sides in the ratio `q`, in (0, 1], over a fraction `tail` of them.

    With lambda = 1 + q - 2 sqrt(q) cos(t) the law has the density 2 sin(t)^2 / (pi lambda) in t, and alpha is
    1 + 1 / E[ln(lambda / xmin) | lambda > xmin]. Raises ValueError for another ratio or fraction.
    """
    if not 0 < q <= 1 or not 0 < tail < 1:
        raise ValueError(
            f"q = {q:g}, tail = {tail:g}: expected the short side over the long side, in (0, 1], and the"
            " fraction of eigenvalues in the tail, between 0 and 1"
        )
    return _null(q, tail)


@lru_cache(maxsize=1024)
def _null(q: float, tail: float) -> float:
    angles, _, density = _law(q, 0.0)
    if q == 1:  # the limit at 0, where both are 0
        density[0] = 2 / math.pi
    above = torch.trapezoid(density, angles) - torch.cumulative_trapezoid(density, angles)
    at = int((above > tail).sum())  # the threshold is between the angles `at` and `at` + 1
    before = float(above[at - 1]) if at else float(torch.trapezoid(density, angles))
    part = (before - tail) / (before - float(above[at]))
    start = float(angles[at]) + part * math.pi / STEPS
    angles, values, density = _law(q, start)
    mean = torch.trapezoid(density * (values / values[0]).log(), angles)
    return 1 + float(torch.trapezoid(density, angles) / mean)


def _law(q: float, start: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return angles from one on, with the eigenvalue and the density of the law at each."""
    angles = torch.linspace(start, math.pi, STEPS + 1, dtype=torch.float64)
    values = 1 + q - 2 * math.sqrt(q) * angles.cos()
    return angles, values, 2 * angles.sin().square() / (math.pi * values)


def null_distance(
    alpha: float,
    shape: tuple[int, ...],
    tail: float = 0.5,
    convention: Convention = "code",
) -> float:
    """Return how far `alpha` is from the null of a weight of `shape`, in standard deviations of the null.

    `alpha` is by `fit = median`, with this `tail` and `convention`; below 0 the tail is heavier than that of
    independent entries. The null and its standard deviation are those of
    `trainc.kernels.parameter.spectral_null.null_law`. Raises ValueError for a shape without a spectrum, or with less
    than 3 eigenvalues.
    """
    centre, spread = null_law(shape, tail, convention)
    return (alpha - centre) / spread


def null_law(
    shape: tuple[int, ...], tail: float = 0.5, convention: Convention = "code"
) -> tuple[float, float]:
    """Return the mean and the standard deviation of alpha for independent entries, by `fit = median`.

    Eigenvalue j of n, from the largest, stands at the fraction p = (j - 1/2) / n of the law, where j of the threshold
    is k (`code`) or k + 1 (`paper`) and k terms are counted: the mean is 1 + (null_alpha(q, p) - 1) k / (n p). The
    standard deviation is taken as 2.1 (mean - 1) / (n sqrt(tail)), over sqrt(kh kw) for a convolution: fitted to
    Gaussian matrices with 32 to 128 columns, q from 1/16 to 1 and tails of 1/3 and 1/2, where it is right within 20 %.
    Raises ValueError for a shape without a spectrum, or with less than 3 eigenvalues.
    """
    eigenvalues = count(shape)
    if eigenvalues < 3:
        raise ValueError(
            f"a spectrum needs a 2-D or 4-D weight with 3 eigenvalues or more, not shape {tuple(shape)}"
        )
    short, long = sorted(shape[:2])
    _, k = Hill.of_tail(tail, convention).tail(eigenvalues)
    place = min(max(k, 1) + (-0.5 if convention == "code" else 0.5), eigenvalues - 0.5)
    above = null_alpha(short / long, place / eigenvalues) - 1
    return 1 + above * k / place, SPREAD * above / math.sqrt(short * eigenvalues * tail)


def calibrated_alpha(
    alpha: float,
    shape: tuple[int, ...],
    tail: float = 0.5,
    convention: Convention = "code",
) -> float:
    """Return the exponent that a large square weight has where it is as far from its null as `alpha` is from its own.

    That is 1 + (null_alpha(1, tail) - 1) (alpha - 1) / (null - 1), where null is that of a weight of `shape`, by
    `fit = median` with this `tail` and `convention`. With independent entries it is 2.12 for every shape, at the
    `tail` of 1/2. Raises ValueError for a shape without a spectrum, or with less than 3 eigenvalues.
    """
    centre, _ = null_law(shape, tail, convention)
    return 1 + (null_alpha(1.0, tail) - 1) * (alpha - 1) / (centre - 1)


def calibrated_spread(
    shape: tuple[int, ...], tail: float = 0.5, convention: Convention = "code"
) -> float:
    """Return the standard deviation of `calibrated_alpha` over weights of `shape` with independent entries."""
    centre, spread = null_law(shape, tail, convention)
    return (null_alpha(1.0, tail) - 1) * spread / (centre - 1)
