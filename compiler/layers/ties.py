"""Weights that a word embedding and the output head share: both are measured, with what ties them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from trainc.compiler.rewrite import LayerSite, MeasuredSite

if TYPE_CHECKING:
    from trainc.compiler.inventory import Inventory


def tied(sites: Sequence[MeasuredSite], inventory: Inventory) -> list[MeasuredSite]:
    """Return the sites with embedding and head of one weight knowing of each other, under the weight's first name.

    Raises ValueError for layers that share a weight otherwise: the square of a sum is no sum of squares.
    """
    owners: dict[str, list[LayerSite]] = {}
    for site in sites:
        if isinstance(site, LayerSite):
            owners.setdefault(inventory.parameter[site.weight].name, []).append(site)
    partner: dict[str, LayerSite] = {}
    for name, sharing in owners.items():
        if len(sharing) == 1:
            continue
        if sorted(site.form for site in sharing) != ["embedding", "linear"]:
            names = ", ".join(f"`{site.module}`" for site in sharing)
            raise ValueError(f"{names} share `{name}`: a sum's square is no sum of squares")
        first, second = sharing
        for own, other in ((first, second), (second, first)):
            partner[own.module] = replace(own, weight=name, tied=other.module)
    return [partner.get(site.module, site) for site in sites]
