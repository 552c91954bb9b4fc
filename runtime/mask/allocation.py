"""Densities of layers by their alphas, the exponents of heavy tails, as AlphaPruning allocates them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean

from trainc.runtime.mask.budget import Shapes

Alphas = Callable[[Iterable[str]], Mapping[str, Sequence[float]]]
"""Measures the alphas of the matrices that each of some tensors consists of."""


def allocate(
    alphas: Sequence[float], numel: Sequence[int], density: float, spread: float = 0.2
) -> list[float]:
    """Return a density for each layer, more where alpha is smaller, whose mean over all entries is `density` exactly.

    The sparsity 1 - d of a layer is in proportion to a number from 1 - `spread`, for the smallest of `alphas`, to
    1 + `spread`, for the largest, linear in between; where all alphas are equal, so are the sparsities. `numel` are the
    entries of each layer. No layer is more than empty: what the sparsities of emptied layers lack is shared by the
    others in proportion, again and again until the total is exact, where published code cuts them off and misses it.

    Raises ValueError for lists of different lengths, alphas that are not finite, layers without entries, a density that
    is not above 0 and at most 1, and a spread that is not from 0 to 1. Source: Lu et al., AlphaPruning, NeurIPS 2024,
    arXiv:2410.10912, equation 2.
    """
    alphas, numel = [*map(float, alphas)], [*map(int, numel)]  # from arrays and tensors, too
    if len(alphas) != len(numel) or not alphas:
        raise ValueError(
            f"expected an alpha and a size for each layer, not {len(alphas)} and {len(numel)}"
        )
    if not all(map(math.isfinite, alphas)):
        raise ValueError("an alpha is not finite: leave its layer out")
    if min(numel) < 1:
        raise ValueError("a layer has no entries: leave it out")
    if not 0 < density <= 1:
        raise ValueError(f"`density` is {density:g}: expected a fraction above 0, at most 1")
    if not 0 <= spread <= 1:
        raise ValueError(f"`spread` is {spread:g}: expected a number from 0 to 1")
    low, high = min(alphas), max(alphas)
    wide = high - low or 1.0
    ratios = [1 - spread + 2 * spread * (a - low) / wide if high > low else 1.0 for a in alphas]
    return [max(0.0, 1 - one) for one in _filled(ratios, numel, 1 - density)]


def _filled(ratios: Sequence[float], sizes: Sequence[int], mean: float) -> list[float]:
    """Return numbers in proportion to ratios, none above 1, with this mean over all entries (water-filling)."""
    full: set[int] = set()
    while True:
        others = [i for i in range(len(ratios)) if i not in full]
        left = mean * sum(sizes) - sum(sizes[i] for i in full)
        total = sum(ratios[i] * sizes[i] for i in others)
        if (
            not total and left > 0
        ):  # all that is left is of ratio 0, as with the smallest alpha at a spread of 1
            share = min(1.0, left / sum(sizes[i] for i in others))
            return [1.0 if i in full else share for i in range(len(ratios))]
        scale = left / total if total else 0.0
        above = {i for i in others if scale * ratios[i] > 1}
        if not above:
            return [1.0 if i in full else scale * ratio for i, ratio in enumerate(ratios)]
        full |= above


class DensitiesByAlpha:
    """Densities of tensors by alphas that are measured when they are asked for: an `Allocation`.

    The tensors of a unit share the mean over all of their matrices. An alpha that means nothing, as of a weight of low
    rank, is left out of it, and a unit without any has the mean of the others.
    """

    def __init__(self, measure: Alphas, units: Sequence[Sequence[str]], spread: float) -> None:
        self.measure, self.units, self.spread = measure, units, spread

    def __call__(self, shapes: Shapes, density: float) -> dict[str, float]:
        """Return the density of each tensor; together they have `density` of all entries exactly."""
        alphas = self.alphas(shapes)
        sizes = [math.prod(shape) for shape in shapes.values()]
        found = allocate([alphas[name] for name in shapes], sizes, density, self.spread)
        return dict(zip(shapes, found, strict=True))

    def alphas(self, names: Iterable[str]) -> dict[str, float]:
        """Return the alpha of each tensor."""
        measured = self.measure(names)
        found: dict[str, float] = {}
        for unit in self.units:
            own = [name for name in unit if name in measured]
            finite = [alpha for name in own for alpha in measured[name] if math.isfinite(alpha)]
            found |= dict.fromkeys(own, fmean(finite) if finite else math.nan)
        known = [alpha for alpha in found.values() if math.isfinite(alpha)]
        middle = fmean(known) if known else 0.0
        return {n: alpha if math.isfinite(alpha) else middle for n, alpha in found.items()}
