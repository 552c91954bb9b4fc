"""Budgets: how many units of each tensor are chosen, from a density of all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

Shapes = Mapping[str, tuple[int, ...]]

Allocation = Callable[[Shapes, float], Mapping[str, float]]
"""Gives each tensor a density of its own, from the shapes of all and their common density, or from weights, too."""

Count = Callable[[int, float], int]
"""How many of a number of units a density is."""


def kept_count(units: int, density: float) -> int:
    """Return how many of `units` are kept where a fraction 1 - density is removed; one at least if there is one."""
    return max(min(1, units), units - round((1 - density) * units))


def erk_densities(shapes: Shapes, density: float) -> dict[str, float]:
    """Return Erdos-Renyi-Kernel densities: each in proportion to the sum of a shape over its product.

    Their mean, weighted by the number of entries, is `density`. Tensors that would have more than all of their entries
    have all of them, and what is left is divided anew among the others. Source: Evci et al., Rigging the Lottery,
    ICML 2020, arXiv:1911.11134, section 3.
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    raw = {name: sum(shapes[name]) / size for name, size in sizes.items() if size}
    whole: set[str] = set()
    left = density * sum(sizes.values())
    while others := [name for name in raw if name not in whole]:
        scale = left / sum(raw[name] * sizes[name] for name in others)
        full = {name for name in others if scale * raw[name] > 1}
        if not full:
            return {
                name: min(1.0, scale * raw.get(name, 0)) if name in others else 1.0
                for name in sizes
            }
        whole |= full
        left -= sum(sizes[name] for name in full)
    return dict.fromkeys(sizes, 1.0)


def shares(
    units: Mapping[str, int], densities: Mapping[str, float], count: Count
) -> dict[str, int]:
    """Return how many units of each tensor a density of its own is: together as many as their mean is of all.

    Each has the whole part of its share, and those with the largest rest one more, the first of equal ones.
    """
    exact = {name: densities[name] * number for name, number in units.items()}
    wanted = count(sum(units.values()), sum(exact.values()) / max(1, sum(units.values())))
    found = {name: min(units[name], math.floor(share + 1e-9)) for name, share in exact.items()}
    by_rest = sorted(units, key=lambda name: found[name] - exact[name])
    while (left := wanted - sum(found.values())) > 0:
        open_ = [name for name in by_rest if found[name] < units[name]][:left]
        for name in open_:
            found[name] += 1
    return found
