"""What a policy on spectra measures and scales: a weight, and the parameters that share its factor."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from trainc.runtime.factors.units import BalancedGroup

if TYPE_CHECKING:
    from trainc.compiler.model.inventory import ParameterEntry


def find_groups(
    parameters: Iterable[ParameterEntry],
) -> tuple[list[BalancedGroup], list[ParameterEntry]]:
    """Return the groups of a selection in registration order, and the parameters without a spectrum."""
    from trainc.kernels.parameter.spectrum import count

    modules: dict[str, list[ParameterEntry]] = {}
    for parameter in parameters:
        modules.setdefault(parameter.module, []).append(parameter)
    groups: list[BalancedGroup] = []
    unfit: list[ParameterEntry] = []
    for name, members in modules.items():
        weights = [p for p in members if p.ndim in (2, 4) and "Embedding" not in p.types]
        vectors = [p for p in members if p.ndim == 1 and weights]
        unfit += [p for p in members if p not in weights and p not in vectors]
        if len(weights) == 1 and name:
            (one,) = weights
            names = tuple(p.name for p in members if p in weights or p in vectors)
            groups.append(BalancedGroup(name, one.name, count(one.shape), names, _block(one)))
        else:
            groups += [
                BalancedGroup(p.name, p.name, count(p.shape), (p.name,), _block(p)) for p in weights
            ]
    return groups, unfit


def _block(parameter: ParameterEntry) -> int | None:
    place = parameter.place
    return place.level if 0 < place.level < place.levels else None
