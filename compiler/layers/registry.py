"""Which layers can be measured: the kind of a module, and the class it is bound as."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from torch import Tensor, nn
from torch.nn.utils import parametrize

from trainc.compiler import layers
from trainc.compiler.errors import NotMeasurable
from trainc.compiler.layers.ghost_batch_norm import BoundGhostBatchNorm
from trainc.compiler.layers.layer import LayerKind
from trainc.compiler.layers.norm import (
    BoundLayerNorm,
    BoundNormGradients,
    BoundRMSNorm,
    norm_site,
)
from trainc.compiler.layers.site_state import BoundLayer
from trainc.compiler.method.sites import MeasuredSite, NormSite


@cache
def layer_kinds() -> dict[str, LayerKind]:
    """Return the kinds by layer type: every LayerKind that a file of this folder defines.

    The norms, which have operators and passes of their own, are not among them.
    """
    return {
        value.layer_type: value
        for file in iter_modules(layers.__path__)
        for value in vars(import_module(f"{layers.__name__}.{file.name}")).values()
        if isinstance(value, LayerKind)
    }


def bound_class(site: MeasuredSite) -> type[BoundLayer]:
    """Return the class that a measured layer's own is combined with."""
    if isinstance(site, NormSite):
        if site.per_example_gradients:
            return BoundNormGradients
        return BoundLayerNorm if site.layer_type == "layer" else BoundRMSNorm
    if site.layer_type == "batch_norm":
        return BoundGhostBatchNorm
    return layer_kinds()[site.layer_type].bound_class


def site_of(name: str, module: nn.Module) -> MeasuredSite:
    """Return how a module is measured; raises NotMeasurable for one that cannot be."""
    _refuse_parametrized(name, module)
    for kind in layer_kinds().values():
        site = kind.recognise(name, module)
        if site is not None:
            return site
    if "norm" in type(module).__name__.lower():
        return norm_site(name, module)
    known = ", ".join(kind.description for kind in layer_kinds().values())
    raise NotMeasurable(
        f"`{name}` ({type(module).__name__}) cannot be measured; per-example norms are supported for norms, {known}."
        " Exclude the layer from `on`"
    )


def _refuse_parametrized(name: str, module: nn.Module) -> None:
    """Refuse a layer whose weight or bias is computed from other parameters in every forward pass."""
    parameters = [n for n, _ in module.named_parameters(recurse=False)]
    if parametrize.is_parametrized(module):
        computed = list(module.parametrizations)  # type: ignore[arg-type]
    else:
        held = {**module._parameters, **module._buffers}
        computed = [
            own
            for own in ("weight", "bias")
            if own not in held
            and any(parameter.startswith(f"{own}_") for parameter in parameters)
            and isinstance(getattr(module, own, None), Tensor)
        ]
    if computed or isinstance(module, parametrize.ParametrizationList):
        what = (
            f"`{name}.{computed[0]}` is computed from other parameters"
            if computed
            else f"`{name}` holds the parameters that a weight is computed from"
        )
        raise NotMeasurable(
            f"{what} (a parametrization, such as weight_norm or spectral_norm): per-example"
            " gradients of a parametrized weight are not supported. Exclude the layer from `on`, or remove the"
            " parametrization"
        )
