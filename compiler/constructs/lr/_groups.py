"""What a policy on spectra measures and scales: parts of weights, and the parameters that share their factor."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from trainc.runtime.factors.units import BalancedGroup, MeasuredPart

if TYPE_CHECKING:
    from trainc.compiler.model.inventory import Inventory, ParameterEntry
    from trainc.compiler.structure.weights import By, MatrixUnit, UsedWeight


def find_groups(
    parameters: Iterable[ParameterEntry], inventory: Inventory, by: By, follow: bool = False
) -> tuple[list[BalancedGroup], list[ParameterEntry]]:
    """Return the groups of a selection in registration order, and the parameters without a spectrum.

    The parameters that a weight is computed of, such as those of an adapter, are in its group. With `follow`, the
    vectors of a module without a matrix are in the group before them in their block, or else in the first of their
    block, or, where their block has no group, in the one before them.
    """
    owners = _owners(inventory)
    modules: dict[str, list[ParameterEntry]] = {}
    for parameter in parameters:
        owner = owners.get(parameter.name)
        modules.setdefault(owner.module if owner else parameter.module, []).append(parameter)
    groups: list[BalancedGroup] = []
    followers: list[tuple[int, ParameterEntry]] = []
    unfit: list[ParameterEntry] = []
    for name, members in modules.items():
        weights: dict[str, list[ParameterEntry]] = {}
        for p in members:
            if p.name in owners:
                weights.setdefault(owners[p.name].name, []).append(p)
        vectors = [p for p in members if p.ndim == 1 and p.name not in owners]
        if follow and not weights:
            followers += [(len(groups), p) for p in vectors]
        kept = vectors if weights or follow else []
        unfit += [p for p in members if p.name not in owners and p not in kept]
        shared = vectors if len(weights) == 1 and name else []
        for own in weights.values():
            used = owners[own[0].name]
            group = name if len(weights) == 1 and name else used.name
            names = tuple(p.name for p in members if p in own or p in shared)
            groups.append(
                BalancedGroup(group, _parts(group, used.units(by)), names, _block(own[0]))
            )
    for position, parameter in followers:
        if (i := _followed(groups, position, _block(parameter))) is not None:
            names = (*groups[i].parameters, parameter.name)
            groups[i] = replace(groups[i], parameters=names)
    return groups, unfit


def _owners(inventory: Inventory) -> dict[str, UsedWeight]:
    """Return the weights with spectra, without tables of embeddings, by the names of the parameters that make them."""
    return {
        name: used
        for used in inventory.weights
        if "Embedding" not in inventory.parameter[used.parameters[0]].types
        for name in used.parameters
    }


def _parts(group: str, units: Iterable[MatrixUnit]) -> tuple[MeasuredPart, ...]:
    return tuple(
        MeasuredPart(
            f"{group}[{unit.part.name}]" if unit.part.name else group,
            unit.name,
            (unit.outputs, unit.inputs, unit.count, 1),
            unit.eigenvalues,
        )
        for unit in units
    )


def _followed(groups: list[BalancedGroup], position: int, block: int | None) -> int | None:
    """Return the number of the group that a vector before the group `position` follows; None where none is near."""
    inside = [i for i, group in enumerate(groups) if group.block == block]
    near = [i for i in inside if i < position] or inside[:1]
    return near[-1] if near else position - 1 if position else None


def _block(parameter: ParameterEntry) -> int | None:
    place = parameter.place
    return place.level if 0 < place.level < place.levels else None
