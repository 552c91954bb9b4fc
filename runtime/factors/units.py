"""Which figures factors follow: those of modules, of blocks or of types of modules, as measured or by a control."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Literal

Unit = Literal["module", "block", "type", "part"]
Control = Literal["none", "permuted", "reversed", "static"]


@dataclass(frozen=True, slots=True)
class MeasuredPart:
    """What is measured together, with `eigenvalues`: a weight or a part of it.

    `shape` is that of a weight, (out, in) or (out, in, kh, kw).
    """

    name: str
    weight: str
    shape: tuple[int, ...]
    eigenvalues: int


@dataclass(frozen=True, slots=True)
class BalancedGroup:
    """The parameters that share one factor, and the parts of their weight that are measured."""

    name: str
    parts: tuple[MeasuredPart, ...]
    parameters: tuple[str, ...]
    block: int | None = None
    """The number of its block, from 1; None for what is before the first or after the last."""

    @property
    def eigenvalues(self) -> int:
        """Return the number of eigenvalues of the part that has most."""
        return max(part.eigenvalues for part in self.parts)

    def without_small_parts(self, least: int) -> BalancedGroup:
        """Return this group without the parts that have fewer eigenvalues than `least`."""
        return replace(self, parts=tuple(p for p in self.parts if p.eigenvalues >= least))

    def unit(self, unit: Unit) -> str | None:
        """Return the name of the unit that it belongs to; None for a group outside of all blocks.

        Modules are of one type where their names differ in numbers alone: `blocks.*.attn`.
        """
        if unit in ("module", "part"):
            return self.name
        if unit == "type":
            return re.sub(r"(?<![^.])\d+(?![^.])", "*", self.name)
        return None if self.block is None else f"block {self.block}"


def apart(groups: Iterable[BalancedGroup], unit: Unit) -> list[BalancedGroup]:
    """Return the groups that have a factor each: with `unit = part` one for each measured part, under its name."""
    if unit != "part":
        return [*groups]
    return [
        replace(group, name=part.name, parts=(part,)) for group in groups for part in group.parts
    ]


def by_unit(groups: Iterable[BalancedGroup], unit: Unit) -> dict[str, list[BalancedGroup]]:
    """Return the groups of each unit."""
    members: dict[str, list[BalancedGroup]] = {}
    for group in groups:
        if (name := group.unit(unit)) is not None:
            members.setdefault(name, []).append(group)
    return members


def unit_means(figures: Mapping[str, float], members: Mapping[str, list[str]]) -> dict[str, float]:
    """Return the mean figure of each unit over those of its parts that have one; units without any are left out."""
    found = {unit: [figures[n] for n in names if n in figures] for unit, names in members.items()}
    return {unit: fmean(values) for unit, values in found.items() if values}


def controlled(
    figures: Mapping[str, float], control: Control, measurement: int
) -> dict[str, float]:
    """Return the figures that a control follows in place of those measured; `measurement` counts from 0.

    A permutation leaves none in its place, where there are two or more: names are put in a random order, and each gets
    the figure of the next.
    """
    if control == "reversed":
        ends = min(figures.values(), default=0.0) + max(figures.values(), default=0.0)
        return {name: ends - figure for name, figure in figures.items()}
    if control != "permuted":
        return dict(figures)
    from trainc.runtime.storage.random_streams import derive_seed

    order = sorted(figures)
    random.Random(derive_seed(measurement, "permuted exponents")).shuffle(order)
    given = dict(zip(order, order[1:] + order[:1], strict=True))
    return {name: figures[given[name]] for name in figures}
