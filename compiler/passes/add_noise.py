"""Multiply the outputs of layers by noise."""

from __future__ import annotations

import torch
from torch import fx

from trainc.compiler.errors import SiteMissing, SiteUnfit
from trainc.compiler.graph.forward_graph import ForwardGraph, module_stack
from trainc.compiler.method.sites import NoiseSite, Rewrite
from trainc.compiler.passes.pass_base import Pass
from trainc.compiler.passes.site_checks import not_example_axis
from trainc.kernels.noise import multiplicative_noise as _noise  # noqa: F401  (registers the operator)


class AddNoise(Pass):
    """Multiplies the output of each noise site by `1 + sigma * normal`."""

    name = "add_noise"
    purpose = "multiply the outputs of the selected layers by noise"
    after = ("fuse_norms", "instrument_norms", "instrument_layers")

    def wants(self, rewrite: Rewrite) -> tuple[str, ...]:
        """Return the noise sites."""
        return tuple(site.module for site in rewrite.noises)

    def run(self, forward: ForwardGraph, rewrite: Rewrite) -> list[str]:
        """Rewrite every noise site."""
        missing = [site.module for site in rewrite.noises if not _add_noise(forward, site)]
        if missing:
            raise SiteMissing(self.name, missing)
        return [site.module for site in rewrite.noises]


def _add_noise(forward: ForwardGraph, site: NoiseSite) -> bool:
    """Put noise after every call of a module; False when the module is not in the graph."""
    ends = _outputs(forward, site.module)
    for node in ends:
        value = node.meta["val"]
        if value.dim() < 2 or value.shape[0] != forward.rows:
            raise not_example_axis(forward, site.module, f"output {list(value.shape)}")
        readers = list(node.users)
        sigma, key = forward.scalar(site.scalar), forward.scalar("key")
        first = forward.scalar("first_example") if "first_example" in forward.available else None
        with forward.graph.inserting_after(node):
            noisy = forward.call(
                torch.ops.trainc.multiplicative_noise.default,
                (node, sigma, key, site.index, forward.views, site.share, first),
                node,
            )
        for reader in readers:
            reader.replace_input_with(node, noisy)
    return bool(ends)


def _outputs(forward: ForwardGraph, module: str) -> list[fx.Node]:
    """Return the output node of each call of a module: the node inside that is read outside."""
    calls: dict[str, list[fx.Node]] = {}
    for node in forward.calls():
        for key, path in module_stack(node).items():
            if path == module:
                calls.setdefault(key, []).append(node)
    ends: list[fx.Node] = []
    for nodes in calls.values():
        inside = set(nodes)
        leaving = [n for n in nodes if any(user not in inside for user in n.users)]
        if len(leaving) != 1:
            raise SiteUnfit(
                module,
                f"the layer has {len(leaving)} outputs in the graph, but noise needs a layer with one",
            )
        ends += leaving
    return ends
