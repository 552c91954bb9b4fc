"""What a policy on spectra measures and scales: a weight, and the parameters that share its factor."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from trainc.runtime.factors.units import BalancedGroup

if TYPE_CHECKING:
    from trainc.compiler.model.inventory import ParameterEntry


def find_groups(
    parameters: Iterable[ParameterEntry], follow: bool = False
) -> tuple[list[BalancedGroup], list[ParameterEntry]]:
    """Return the groups of a selection in registration order, and the parameters without a spectrum.

    With `follow`, the vectors of a module without a matrix are in the group before them in their block, or else in the
    first of their block, or, where their block has no group, in the one before them.
    """
    from trainc.kernels.parameter.spectrum import count

    modules: dict[str, list[ParameterEntry]] = {}
    for parameter in parameters:
        modules.setdefault(parameter.module, []).append(parameter)
    groups: list[BalancedGroup] = []
    followers: list[tuple[int, ParameterEntry]] = []
    unfit: list[ParameterEntry] = []
    for name, members in modules.items():
        weights = [p for p in members if p.ndim in (2, 4) and "Embedding" not in p.types]
        vectors = [p for p in members if p.ndim == 1]
        if follow and not weights:
            followers += [(len(groups), p) for p in vectors]
        kept = vectors if weights or follow else []
        unfit += [p for p in members if p not in weights and p not in kept]
        if len(weights) == 1 and name:
            names = tuple(p.name for p in members if p in weights or p in vectors)
            groups.append(_group(name, weights[0], count(weights[0].shape), names))
        else:
            groups += [_group(p.name, p, count(p.shape), (p.name,)) for p in weights]
    for position, parameter in followers:
        if (i := _followed(groups, position, _block(parameter))) is not None:
            names = (*groups[i].parameters, parameter.name)
            groups[i] = replace(groups[i], parameters=names)
    return groups, unfit


def _group(
    name: str, weight: ParameterEntry, eigenvalues: int, names: tuple[str, ...]
) -> BalancedGroup:
    return BalancedGroup(name, weight.name, weight.shape, eigenvalues, names, _block(weight))


def _followed(groups: list[BalancedGroup], position: int, block: int | None) -> int | None:
    """Return the number of the group that a vector before the group `position` follows; None where none is near."""
    inside = [i for i, group in enumerate(groups) if group.block == block]
    near = [i for i in inside if i < position] or inside[:1]
    return near[-1] if near else position - 1 if position else None


def _block(parameter: ParameterEntry) -> int | None:
    place = parameter.place
    return place.level if 0 < place.level < place.levels else None
