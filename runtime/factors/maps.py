"""From measured exponents to learning rates: the maps of TempBalance, of model balancing, and of layer-wise rates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Literal, get_args

Map = Literal["linear", "sqrt", "log2", "step", "sigmoid"]

# A relative spread of the exponents below this is the arithmetic's, not the layers'.
NO_SPREAD = 1e-5


def balance(
    alphas: Sequence[float],
    base: float = 1.0,
    range: tuple[float, float] = (0.5, 1.5),  # as the field of constructs is called
    map: Map = "linear",
    steepness: float = 10.0,
) -> list[float]:
    """Return the learning rates of layers from their exponents `alphas`: `base` times factors that grow with them.

    `map` says how:
    * `linear`: from the low end of `range` at the smallest exponent to the high end at the largest;
    * `step`: low + (high - low) r / n for the exponent with rank r of n, from 0, so that none gets the high end;
    * `sqrt`, `log2`: proportional to sqrt(alpha) or log2(alpha), with a mean of 1; `range` has no part in them;
    * `sigmoid`: 10^(s (1 / (1 + exp(-t (alpha - mean))) - 1/2)), with t = `steepness` and, below and above the mean,
      the s for which the ends of `range` are its limits.

    An exponent that is not finite has no part, and its layer gets `base`; so do all where the others are equal, or
    one alone (published code gives the high end there). Sources: TempBalance (Zhou et al. 2023) for all but
    `sigmoid`, which is model balancing's (Liu et al. 2024). Raises ValueError for a map, range or steepness
    that is none of these, and for exponents that `sqrt` and `log2` have no factor for.
    """
    low, high = range
    if map not in get_args(Map):
        raise ValueError(f"map = {map!r}: expected {', '.join(get_args(Map))}")
    if not 0 <= low <= high < math.inf or (map == "sigmoid" and not 0 < low <= 1 <= high):
        among = "0 < low <= 1 <= high" if map == "sigmoid" else "0 <= low <= high"
        raise ValueError(f"range = {low:g}..{high:g}: expected {among}")
    if not 0 < steepness < math.inf:
        raise ValueError(f"steepness = {steepness:g}: expected a finite number above 0")
    known = {i: alpha for i, alpha in enumerate(alphas) if math.isfinite(alpha)}
    factors = _factors(known, low, high, map, steepness)
    return [base * factors.get(i, 1.0) for i, _ in enumerate(alphas)]


def _factors(
    alphas: Mapping[int, float], low: float, high: float, map: Map, steepness: float
) -> dict[int, float]:
    least, most = min(alphas.values(), default=0.0), max(alphas.values(), default=0.0)
    if most - least <= NO_SPREAD * abs(most):
        return {}
    if map == "linear":
        slope = (high - low) / (most - least)
        return {i: low + slope * (alpha - least) for i, alpha in alphas.items()}
    if map == "step":
        ranked = sorted(alphas, key=lambda i: alphas[i])
        return {i: low + (high - low) * r / len(ranked) for r, i in enumerate(ranked)}
    if map == "sigmoid":
        mean = fmean(alphas.values())
        return {i: _sigmoid(a - mean, low, high, steepness) for i, a in alphas.items()}
    if least <= (0 if map == "sqrt" else 1):
        raise ValueError(
            f"map = {map!r} needs figures above {0 if map == 'sqrt' else 1}, and one is {least:g}: use `linear`,"
            " `step` or `sigmoid`"
        )
    scale = math.sqrt if map == "sqrt" else math.log2
    mean = fmean(scale(alpha) for alpha in alphas.values())
    return {i: scale(alpha) / mean for i, alpha in alphas.items()}


def _sigmoid(above: float, low: float, high: float, steepness: float) -> float:
    strength = 2 * abs(math.log10(high if above > 0 else low))
    place = 1 / (1 + math.exp(min(-steepness * above, 700.0)))
    return float(10 ** (strength * (place - 0.5)))
