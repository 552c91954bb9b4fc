"""Replace measured layers by operators with a probe: zeros whose gradient is per-example squared gradient norms."""

from __future__ import annotations

import torch
from torch import fx

from trainc.compiler.errors import SiteUnfit
from trainc.compiler.graph.forward_graph import ForwardGraph
from trainc.compiler.graph.sizes import same_shape, same_size
from trainc.compiler.layers.embedding import expand_shared_ids
from trainc.compiler.layers.layer import LayerKind, LayerMatch
from trainc.compiler.layers.registry import layer_kinds
from trainc.compiler.method.sites import LayerSite, Rewrite
from trainc.compiler.passes.joined_views import join_views, separate_views
from trainc.compiler.passes.pass_base import Pass
from trainc.compiler.passes.site_checks import (
    check_weight_uses,
    not_example_axis,
    sizes_with_one_more,
    starts_with_examples,
)

aten = torch.ops.aten


class InstrumentLayers(Pass):
    """Puts the measuring operator in place of each selected layer other than a norm."""

    name = "instrument_layers"
    purpose = "measure per-example squared gradient norms at the selected layers"

    def wants(self, rewrite: Rewrite) -> tuple[str, ...]:
        """Return the layer sites."""
        return tuple(site.module for site in rewrite.layers)

    def run(self, forward: ForwardGraph, rewrite: Rewrite) -> list[str]:
        """Rewrite every layer site that is in the graph."""
        calls = {site.module: _call(forward, site) for site in rewrite.layers}
        sizes = sizes_with_one_more(forward, lambda other: _input_sizes(other, rewrite))
        for site in rewrite.layers:
            node = calls[site.module]
            if node is None:
                continue
            if site.tied is not None:
                raise SiteUnfit(
                    site.module,
                    f"the layer shares its weight with `{site.tied}`, but shared weights need bound modules",
                )
            match = layer_kinds()[site.layer_type].match(forward, site, node)
            if match is None:
                raise SiteUnfit(
                    site.module,
                    f"the layer was captured as a call of `{node.target}` in an unknown form",
                )
            self.serve(forward, site, node, match, sizes.get(site.module))
        return [name for name, node in calls.items() if node is not None]

    def serve(
        self,
        forward: ForwardGraph,
        site: LayerSite,
        node: fx.Node,
        match: LayerMatch,
        size_with_one_more: int | None,
    ) -> None:
        """Put the operator in place of one call."""
        value = match.x.meta["val"]
        size = value.shape[0]
        # Ids that do not belong to single examples, such as positions.
        known = size_with_one_more is not None
        fixed = size == size_with_one_more if known else not same_size(size, forward.rows)
        shared = (
            site.layer_type == "embedding" and fixed and (value.dim() == 1 or same_size(size, 1))
        )
        if not shared and not starts_with_examples(forward, size, size_with_one_more):
            raise not_example_axis(forward, site.module, f"input {list(value.shape)}")
        joined = forward.views > 1
        if joined and not layer_kinds()[site.layer_type].joins_views:
            raise SiteUnfit(
                site.module,
                "a layer of this kind cannot join the two views of an example. Exclude it from `on`",
            )
        like = node.meta["val"]
        probe = forward.probe(site.module, len(site.parameters), like)
        with forward.graph.inserting_before(node):
            x = match.x
            if shared:
                ids = expand_shared_ids(value, forward.rows)
                x = forward.call(aten.expand.default, (x, list(ids.shape)), node)
            lead = [forward.rows, *x.meta["val"].shape[1:]]
            if joined:
                x = join_views(forward, x, node)
            result = match.insert(x, probe)
            if joined:
                lead = lead[:-1] if site.layer_type == "linear" else lead
                result = separate_views(forward, result, lead, node)
            shape = list(like.shape)
            if not shared and not same_shape(result.meta["val"].shape, shape):
                result = forward.call(aten.reshape.default, (result, shape), node)
        node.replace_all_uses_with(result)
        forward.graph.erase_node(node)


def _call(forward: ForwardGraph, site: LayerSite) -> fx.Node | None:
    """Return the one call of a layer, found by its weight; raises SiteUnfit when the weight is used twice."""
    kind = layer_kinds()[site.layer_type]
    name = forward.canonical_name(site.weight)
    mine = [node for node in forward.calls() if _reads(forward, kind, node, name)]
    if not mine:
        return None
    allowed = 1 if site.tied is None else 2
    check_weight_uses(forward, site.module, site.weight, len(mine), allowed)
    return mine[0]


def _reads(forward: ForwardGraph, kind: LayerKind, node: fx.Node, name: str) -> bool:
    place = kind.weight_at.get(node.target)
    return place is not None and forward.tensor_name(node.args[place]) == name


def _input_sizes(forward: ForwardGraph, rewrite: Rewrite) -> dict[str, int]:
    found = {}
    for site in rewrite.layers:
        node = _call(forward, site)
        call = None if node is None else layer_kinds()[site.layer_type].match(forward, site, node)
        if call is not None:
            found[site.module] = int(call.x.meta["val"].shape[0])
    return found
