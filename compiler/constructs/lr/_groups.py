"""What a policy on spectra measures and scales: parts of weights, and the parameters that share their factor."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from trainc.compiler.errors import FieldError
from trainc.runtime.factors.units import BalancedGroup, MeasuredPart

if TYPE_CHECKING:
    from trainc.compiler.lower.lowering import Lowering
    from trainc.compiler.model.inventory import Inventory, ParameterEntry
    from trainc.compiler.structure.weights import By, MatrixUnit
    from trainc.runtime.factors.slices import Slices
    from trainc.runtime.schedule.clock import Clock
    from trainc.runtime.step.optimizer import LrFactor


def find_groups(
    parameters: Iterable[ParameterEntry], inventory: Inventory, by: By, follow: bool = False
) -> tuple[list[BalancedGroup], list[ParameterEntry]]:
    """Return the groups of a selection in registration order, and the parameters without a spectrum.

    The parameters that a weight is computed of, such as those of an adapter, are in its group. With `follow`, the
    vectors of a module without a matrix are in the group before them in their block, or else in the first of their
    block, or, where their block has no group, in the one before them.
    """
    owners = inventory.weight_of
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
                BalancedGroup(group, _parts(group, used.units(by)), names, own[0].place.inner_level)
            )
    for position, parameter in followers:
        if (i := _followed(groups, position, parameter.place.inner_level)) is not None:
            names = (*groups[i].parameters, parameter.name)
            groups[i] = replace(groups[i], parameters=names)
    return groups, unfit


def show_measured(
    to: Lowering, units: Collection[MatrixUnit], by: By, why: str, *, apart: bool
) -> None:
    """Show in the plan which units of each weight are measured, and `why`, or else why it is divided so.

    Several units of a weight have a factor each where they are `apart`, else that of their mean.
    """
    names = {unit.name for unit in units}
    for name, weight in {unit.weight.name: unit.weight for unit in units}.items():
        own = weight.units(by)
        sizes = {unit.part.name: unit.size for unit in own if unit.name in names}
        factor = "a factor each" if apart else "the factor of their mean"
        said = [why or weight.reason, factor * (len(sizes) > 1)]
        if small := len(own) - len(sizes):
            said.append(f"{small} too small")
        to.measures(name, sizes, "; ".join(filter(None, said)))


def slice_factors(
    to: Lowering,
    groups: Iterable[BalancedGroup],
    units: Mapping[str, MatrixUnit],
    by: By,
    limits: tuple[float, float] | None,
) -> dict[str, LrFactor]:
    """Return a factor for each part of the groups whose weight divides, by the part's name; the others are left out.

    What else is in such a group, such as a bias, has the mean of them. Raises FieldError for a weight that is computed.
    """
    from trainc.runtime.factors.slices import ScaleSlices, Slices
    from trainc.runtime.step.optimizer import LrFactor

    found: dict[str, LrFactor] = {}
    slices: dict[str, Slices] = {}
    for group in groups:
        weight = units[group.parts[0].weight].weight
        every = weight.units(by)
        if len(every) < 2:
            continue
        name = weight.parameters[0]
        if len(weight.parameters) > 1 or to.inventory.parameter[name].shape != weight.shape:
            raise FieldError(
                "unit",
                f"`{weight.name}` is computed of {len(weight.parameters)} parameters ({weight.computed}), which have no"
                " slices that are its parts: write another `unit`, or exclude it",
            )
        own = {part.weight: part.name for part in group.parts}
        # A part that is too small to be measured keeps the rate.
        factors = [(one, LrFactor(to.label, own.get(one.name, one.name))) for one in every]
        found |= {own[one.name]: factor for one, factor in factors if one.name in own}
        cuts = ((partial(weight.division.views, part=one.part), factor) for one, factor in factors)
        slices[name] = Slices(weight.shape, tuple(cuts))
        whole = to.lr_factor(group.name, group.parameters, holds=True)
        whole.schedule, whole.limits = partial(_mean, slices[name]), limits
    if slices:
        to.delta(ScaleSlices(f"{to.label} slices", slices), slices)
    return found


def _mean(slices: Slices, clock: Clock) -> float:
    return slices.mean


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
