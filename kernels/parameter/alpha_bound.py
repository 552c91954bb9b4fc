"""How far alpha can have moved when a weight has changed by a known norm: a bound that needs no new spectrum.

A change D of a weight moves its singular values s, in ascending order, by d with |d_i| <= |D|_2 (Weyl) and
sum(d_i^2) <= |D|_F^2 (Hoffman and Wielandt); Horn and Johnson, Topics in Matrix Analysis, 1991, 3.3 and 3.5. For the
values of several matrices together both hold as well.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trainc.kernels.parameter.spectrum import RANK, Hill

HALVINGS = 40


def alpha_range(spectrum: Tensor, change: float, hill: Hill) -> tuple[float, float]:
    """Return the least and the largest alpha that a weight may have after a change with Frobenius norm `change`.

    `spectrum` are its ascending eigenvalues (n,) before: squared singular values, and `hill` says of which of them
    alpha is. The largest is infinite, and the least 1, where the change may reach the threshold's value.
    """
    values = spectrum.double().clamp_min(0).sqrt()
    index, k = hill.tail(len(values))
    at, tail = float(values[index]), values[len(values) - k :]
    if not change < at:
        return 1.0, math.inf
    middle = float((tail / at).log().sum())
    up = _reach(values[index:] - at, change)
    down = _reach((at - values[: index + 1]).flip(0), change)
    # sum(ln(1 + d / s)) <= |d| |1 / s|, and with d >= -c < 0: ln(1 - u) >= -u / (1 - c / s).
    sums = change * float(tail.pow(-2).sum().sqrt())
    most = middle + sums - k * math.log1p(-down / at)
    least = middle - sums / (1 - change / at) - k * math.log1p(up / at)
    return 1 + k / (2 * most), 1 + k / (2 * least) if least > 0 else math.inf


def allowed_change(spectrum: Tensor, tolerance: float, hill: Hill) -> float:
    """Return a Frobenius norm of a change that moves alpha by at most `tolerance`; 0 where alpha means nothing."""
    alpha = hill.alpha(spectrum)
    values = spectrum.double().clamp_min(0)
    index, _ = hill.tail(len(values))
    if not math.isfinite(alpha) or not float(values[index]) > RANK * float(values[-1]):
        return 0.0
    low, high = 0.0, float(values[index].sqrt())
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        least, most = alpha_range(spectrum, middle, hill)
        if alpha - least <= tolerance and most - alpha <= tolerance:
            low = middle
        else:
            high = middle
    return low


def _reach(gaps: Tensor, change: float) -> float:
    """Return how far the first of ordered values can move towards the others, whose distances from it are `gaps`.

    To move by t it takes those with it that are nearer than t, which costs sum((t - gap)^2) of change^2.
    """
    count = torch.arange(1, len(gaps) + 1, dtype=torch.float64)
    sums, squares = gaps.cumsum(0), gaps.square().cumsum(0)
    # The cost of coming to the gap after each; the last has none after it.
    after = torch.cat([gaps[1:], gaps.new_tensor([math.inf])])
    cost = count * after.square() - 2 * after * sums + squares
    first = int((cost.nan_to_num(math.inf) < change**2).sum())
    n, total, square = count[first], sums[first], squares[first]
    root = (total.square() - n * (square - change**2)).clamp_min(0).sqrt()
    return min(change, float((total + root) / n))
