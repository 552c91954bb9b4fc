"""Which figures factors follow: those of modules or of blocks, as measured or as a control changes them."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

Unit = Literal["module", "block"]
Control = Literal["none", "permuted", "reversed", "static"]


@dataclass(frozen=True, slots=True)
class BalancedGroup:
    """The parameters that share one factor, and the one of them that is measured, by its `eigenvalues`."""

    name: str
    weight: str
    eigenvalues: int
    parameters: tuple[str, ...]
    block: int | None = None
    """The number of its block, from 1; None for what is before the first or after the last."""


def by_unit(
    alphas: Mapping[str, float], blocks: Mapping[str, int | None] | None
) -> tuple[dict[str, float], dict[str, list[str]]]:
    """Return the exponent of each unit, and its members: of each name alone, or the mean over a block where given.

    Names without a block have no part.
    """
    members: dict[str, list[str]] = {}
    for name in alphas:
        if blocks is None:
            members[name] = [name]
        elif blocks[name] is not None:
            members.setdefault(f"block {blocks[name]}", []).append(name)
    means = {unit: fmean(alphas[name] for name in names) for unit, names in members.items()}
    return means, members


def controlled(alphas: Mapping[str, float], control: Control, measurement: int) -> dict[str, float]:
    """Return the exponents that a control follows in place of those measured; `measurement` counts from 0.

    A permutation leaves none in its place, where there are two or more: names are put in a random order, and each gets
    the exponent of the next.
    """
    if control == "reversed":
        ends = min(alphas.values(), default=0.0) + max(alphas.values(), default=0.0)
        return {name: ends - alpha for name, alpha in alphas.items()}
    if control != "permuted":
        return dict(alphas)
    from trainc.runtime.storage.random_streams import derive_seed

    order = sorted(alphas)
    random.Random(derive_seed(measurement, "permuted exponents")).shuffle(order)
    given = dict(zip(order, order[1:] + order[:1], strict=True))
    return {name: alphas[given[name]] for name in alphas}
