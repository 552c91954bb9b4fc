"""Which sites measure a selection of parameters, where layers share them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace

from torch import nn

from trainc.compiler.errors import NotMeasurable, listed
from trainc.compiler.layers.registry import site_of
from trainc.compiler.method.sites import LayerSite, MeasuredSite, NormSite
from trainc.compiler.model.inventory import Inventory


def sites_of(
    modules: Iterable[str],
    wanted: Collection[str],
    model: nn.Module,
    inventory: Inventory,
    recognise: Callable[[str, nn.Module], MeasuredSite] = site_of,
) -> list[MeasuredSite]:
    """Return the sites that measure the parameters `wanted` (first names), all of which `modules` hold.

    A parent that keeps a Parameter of a measured child under a name of its own, as BERT's head does its decoder's bias,
    gets no site: should it use that itself, `examine` finds it. Raises NotMeasurable for a wanted parameter that no
    site can measure.
    """
    sites: list[MeasuredSite] = []
    refused: dict[str, NotMeasurable] = {}
    for name in modules:
        if name not in inventory.module:  # another name of a module that has one already
            continue
        try:
            sites.append(recognise(name, model.get_submodule(name)))
        except NotMeasurable as error:
            refused[name] = error
    sites = tied(sites, inventory)
    for name, reason in refused.items():
        own = {inventory.parameter[n].name for n in inventory.module[name].parameters}
        for parameter in sorted(own & set(wanted)):
            owners = [site.module for site in sites if parameter in site.parameters]
            if not owners:
                raise reason
            if name and not all(owner.startswith(f"{name}.") for owner in owners):
                raise NotMeasurable(
                    f"`{name}` shares `{parameter}` with {listed(owners)}; per-example norms of shared weights are"
                    " supported for an embedding and its output head only. Exclude"
                    f" {listed([*owners, name])} from `on`. {reason}"
                )
    return sites


def tied(sites: Sequence[MeasuredSite], inventory: Inventory) -> list[MeasuredSite]:
    """Return the sites with their parameters' first names; an embedding and a head of one weight name each other.

    Raises ValueError for layers that share a parameter otherwise.
    """
    named = [_first_names(site, inventory) for site in sites]
    owners: dict[str, list[MeasuredSite]] = {}
    for site in named:
        for name in site.parameters:
            if name is not None:
                owners.setdefault(name, []).append(site)
    partner: dict[str, str] = {}
    for name, sharing in owners.items():
        if len(sharing) == 1:
            continue
        types = sorted(site.layer_type for site in sharing)
        if types != ["embedding", "linear"] or any(site.weight != name for site in sharing):
            raise ValueError(
                f"{listed(site.module for site in sharing)} share `{name}`; per-example norms of shared weights are"
                " supported for an embedding and its output head only. Exclude them from `on`"
            )
        first, second = (site.module for site in sharing)
        partner |= {first: second, second: first}
    return [
        replace(site, tied=partner.get(site.module)) if isinstance(site, LayerSite) else site
        for site in named
    ]


def _first_names(site: MeasuredSite, inventory: Inventory) -> NormSite | LayerSite:
    weight, bias = (n and inventory.parameter[n].name for n in (site.weight, site.bias))
    if isinstance(site, NormSite):
        return replace(site, weight=weight, bias=bias)
    return replace(site, weight=inventory.parameter[site.weight].name, bias=bias)
