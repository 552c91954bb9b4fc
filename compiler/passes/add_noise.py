"""Multiply the outputs of layers by noise in one operator."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from trainc.compiler.errors import SiteMissing
from trainc.compiler.graph.forward_graph import CAST, ForwardGraph, arguments
from trainc.compiler.graph.sizes import same_size
from trainc.compiler.method.layer_hook import LayerHookSite
from trainc.compiler.method.sites import Rewrite
from trainc.compiler.passes.pass_base import Pass
from trainc.compiler.passes.site_checks import not_example_axis
from trainc.kernels.noise import multiplicative_noise as _noise  # noqa: F401  (registers the operator)

aten = torch.ops.aten
NOISE = torch.ops.trainc.multiplicative_noise.default


class AddNoise(Pass):
    """Puts one operator in place of the factor of each noise site, `1 + sigma * normal`, and the product with it."""

    name = "add_noise"
    purpose = "multiply the outputs of the selected layers by noise"
    after = ("fuse_norms", "instrument_norms", "instrument_layers")

    def wants(self, rewrite: Rewrite) -> tuple[str, ...]:
        """Return the noise sites."""
        return tuple(site.module for site in _sites(rewrite))

    def run(self, forward: ForwardGraph, rewrite: Rewrite) -> list[str]:
        """Rewrite every noise site; the module of one in eval mode has none."""
        for site in _sites(rewrite):
            for factor in _factors(forward, site):
                _fuse(forward, site, factor)
        return list(self.wants(rewrite))


def _sites(rewrite: Rewrite) -> list[LayerHookSite]:
    return [site for site in rewrite.hooks if site.hook.fused_by == AddNoise.name]


def _factors(forward: ForwardGraph, site: LayerHookSite) -> Iterator[fx.Node]:
    """Yield the factors of a site: the noise on ones."""
    for node in forward.calls():
        if node.target is NOISE:
            given = arguments(node)
            if given["site"] == site.index and given["x"].target is aten.ones.default:
                yield node


def _fuse(forward: ForwardGraph, site: LayerHookSite, factor: fx.Node) -> None:
    """Replace `x * factor`, and the cast to the dtype of x behind it, by the operator on x."""
    (product,) = factor.users
    if product.target is not aten.mul.Tensor:
        raise SiteMissing(AddNoise.name, [site.module])
    x = product.args[0]
    assert isinstance(x, fx.Node)
    value, result = x.meta["val"], product
    if not same_size(value.shape[0], forward.rows):
        raise not_example_axis(forward, site.module, f"output {list(value.shape)}")
    if value.dtype != product.meta["val"].dtype:
        (result,) = product.users
        if result.target not in CAST:
            raise SiteMissing(AddNoise.name, [site.module])
    with forward.graph.inserting_before(product):
        noisy = forward.call(NOISE, (x, *factor.args[1:]), product)
    result.replace_all_uses_with(noisy)
