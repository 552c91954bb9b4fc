"""The kinds of layers that can be measured: which kind a module is of, and what serves it on either road."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from trainc.compiler.errors import NotMeasurable
from trainc.compiler.method.sites import LayerSite, MeasuredSite, NormSite

if TYPE_CHECKING:
    from torch import fx, nn

    from trainc.compiler.graph.forward_graph import ForwardGraph
    from trainc.compiler.layers.site_state import Bound


@dataclass(frozen=True, slots=True)
class Found:
    """An operator call of a captured graph that a measured layer made: its input, and how to put ours in its place.

    `insert(x, probe)` adds our operator before the call and returns the node that stands for the call's result.
    """

    x: fx.Node
    insert: Callable[[fx.Node, fx.Node], fx.Node]


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of layer.

    `recognise(name, module)` returns the site of a module of this kind, else None. `weight_at` maps the ATen
    operators that such a layer is captured as to the place of the weight among their arguments; `find` reads a call.
    """

    form: str
    says: str
    recognise: Callable[[str, nn.Module], LayerSite | None]
    behaviour: type[Bound]
    weight_at: Mapping[Any, int]
    find: Callable[[ForwardGraph, LayerSite, fx.Node], Found | None]


@cache
def kinds() -> dict[str, Kind]:
    """Return the kinds by form; the norms, which have operators and passes of their own, are not among them."""
    from trainc.compiler.layers.convolution import CONVOLUTION
    from trainc.compiler.layers.embedding import EMBEDDING
    from trainc.compiler.layers.group_norm import GROUP_NORM
    from trainc.compiler.layers.linear import LINEAR

    return {kind.form: kind for kind in (LINEAR, EMBEDDING, CONVOLUTION, GROUP_NORM)}


def behaviour(site: MeasuredSite) -> type[Bound]:
    """Return what a measured layer's class is mixed with."""
    from trainc.compiler.layers.norm import BoundLayerNorm, BoundRMSNorm
    from trainc.compiler.layers.norm_gradients import BoundWideNorm

    if isinstance(site, NormSite):
        if site.per_example_gradients:
            return BoundWideNorm
        return BoundLayerNorm if site.form == "layer" else BoundRMSNorm
    return kinds()[site.form].behaviour


def site_of(name: str, module: nn.Module) -> MeasuredSite:
    """Return how a module is measured; raises NotMeasurable for one we do not know."""
    from trainc.compiler.layers.norm import norm_site

    _refuse_computed(name, module)
    for kind in kinds().values():
        site = kind.recognise(name, module)
        if site is not None:
            return site
    if "norm" in type(module).__name__.lower():
        return norm_site(name, module)
    known = ", ".join(kind.says for kind in kinds().values())
    raise NotMeasurable(
        f"`{name}` ({type(module).__name__}) computes something else than the layers that can be measured: norms,"
        f" {known}; leave it out of the selection"
    )


def _refuse_computed(name: str, module: nn.Module) -> None:
    """Refuse a layer whose weight or bias is no Parameter but computed from others in every forward pass."""
    from torch import Tensor
    from torch.nn.utils import parametrize

    parts = [n for n, _ in module.named_parameters(recurse=False)]
    if parametrize.is_parametrized(module):
        made = list(module.parametrizations)  # type: ignore[arg-type]
    else:
        held = {**module._parameters, **module._buffers}
        made = [
            own
            for own in ("weight", "bias")
            if own not in held
            and any(part.startswith(f"{own}_") for part in parts)
            and isinstance(getattr(module, own, None), Tensor)
        ]
    if made or isinstance(module, parametrize.ParametrizationList):
        what = f"`{name}.{made[0]}` is" if made else f"`{name}` holds what a weight is"
        raise NotMeasurable(
            f"{what} computed from other parameters (a parametrization, as of weight_norm or spectral_norm): the"
            " examples' gradients of those are not to be had; leave the layer out of the selection, or take the"
            " parametrization off it"
        )


def own_names(name: str, module: nn.Module) -> dict[str, str]:
    """Return a module's direct parameters: the model's names by the module's own."""
    path = f"{name}." if name else ""
    return {own: f"{path}{own}" for own, _ in module.named_parameters(recurse=False)}
