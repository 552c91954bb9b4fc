"""Replace measured layers by operators with a probe: zeros whose gradient is per-example squared gradient norms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from trainc.compiler.errors import SiteUnfit
from trainc.compiler.graph.forward_graph import ForwardGraph
from trainc.compiler.layers.embedding import spread
from trainc.compiler.layers.registry import Found, Kind, kinds
from trainc.compiler.method.sites import LayerSite, Rewrite
from trainc.compiler.passes.norm_patterns import CAST, strip
from trainc.compiler.passes.pass_base import Pass

aten = torch.ops.aten
_JOINED = ("linear", "embedding")
"""Kinds that take an example's views as one more axis behind the examples."""


@dataclass(frozen=True)
class InstrumentLayers(Pass):
    """Puts the measuring operator in place of each selected layer other than a norm."""

    name: ClassVar[str] = "instrument_layers"
    purpose: ClassVar[str] = "measure per-example squared gradient norms at the selected layers"
    before: ClassVar[tuple[str, ...]] = ("insert_consistency",)
    exact: ClassVar[bool] = False

    def wants(self, rewrite: Rewrite) -> tuple[str, ...]:
        """Return the layer sites."""
        return tuple(site.module for site in rewrite.layers)

    def run(self, forward: ForwardGraph, rewrite: Rewrite) -> list[str]:
        """Serve every layer site that is in the graph."""
        calls = {site.module: _call(forward, site) for site in rewrite.layers}
        size_with_one_more = _enlarged_sizes(forward, rewrite)
        for site in rewrite.layers:
            node = calls[site.module]
            if node is None:
                continue
            if site.tied is not None:
                raise SiteUnfit(
                    site.module,
                    "weights that embedding and head share are measured module by module",
                )
            found = kinds()[site.form].find(forward, site, node)
            if found is None:
                raise SiteUnfit(site.module, f"`{node.target}` is called in a way we do not know")
            self.serve(forward, site, node, found, size_with_one_more.get(site.module))
        return [name for name, node in calls.items() if node is not None]

    def serve(
        self,
        forward: ForwardGraph,
        site: LayerSite,
        node: fx.Node,
        found: Found,
        size_with_one_more: int | None,
    ) -> None:
        """Put the operator in place of one call."""
        value = found.x.meta["val"]
        shared = _is_shared(site, value.dim(), value.shape[0], size_with_one_more, forward)
        if not shared and (
            value.shape[0] != forward.rows
            or size_with_one_more not in (None, forward.rows + forward.views)
        ):
            raise SiteUnfit(
                site.module,
                f"the first axis of its input {list(value.shape)} is not the axis of "
                f"the {forward.rows} examples, so per-example norms cannot be taken there",
            )
        if forward.views > 1 and site.form not in _JOINED:
            raise SiteUnfit(site.module, "two views of an example cannot be joined at this layer")
        dtype = torch.float64 if node.meta["val"].dtype == torch.float64 else torch.float32
        device = node.meta["val"].device
        zeros = torch.zeros(forward.examples, len(site.parameters), dtype=dtype, device=device)
        probe = forward.probe(site.module, zeros)
        with forward.graph.inserting_before(node):
            x = _spread(forward, found.x, node) if shared else found.x
            whole = [forward.rows, *x.meta["val"].shape[1:]]
            if forward.views > 1:
                x = _joined(forward, x, node)
            result = found.insert(x, probe)
            if forward.views > 1:
                result = _parted(
                    forward, result, whole[:-1] if site.form == "linear" else whole, node
                )
            shape = list(node.meta["val"].shape)
            if not shared and list(result.meta["val"].shape) != shape:
                result = forward.call(aten.reshape.default, (result, shape), node)
        node.replace_all_uses_with(result)
        forward.graph.erase_node(node)


def _is_shared(
    site: LayerSite,
    dims: int,
    size: int,
    size_with_one_more: int | None,
    forward: ForwardGraph,
) -> bool:
    """Say whether an embedding looks up ids that do not belong to single examples, such as positions."""
    grows = size_with_one_more is not None and size_with_one_more != size
    return (
        site.form == "embedding"
        and not grows
        and (dims == 1 or size == 1)
        and not (size_with_one_more is None and size == forward.rows)
    )


def _spread(forward: ForwardGraph, ids: fx.Node, like: fx.Node) -> fx.Node:
    shape = spread(ids.meta["val"], forward.rows).shape
    return forward.call(aten.expand.default, (ids, list(shape)), like)


def _joined(forward: ForwardGraph, x: fx.Node, like: fx.Node) -> fx.Node:
    split = [forward.views, forward.examples, *x.meta["val"].shape[1:]]
    apart = forward.call(aten.reshape.default, (x, split), like)
    return forward.call(aten.transpose.int, (apart, 0, 1), like)


def _parted(forward: ForwardGraph, y: fx.Node, lead: list[int], like: fx.Node) -> fx.Node:
    apart = forward.call(aten.transpose.int, (y, 0, 1), like)
    return forward.call(aten.reshape.default, (apart, [*lead, y.meta["val"].shape[-1]]), like)


def _call(forward: ForwardGraph, site: LayerSite) -> fx.Node | None:
    """Return the one call of a layer, found by its weight; raises SiteUnfit when the weight serves twice."""
    kind = kinds()[site.form]
    name = forward.canonical.get(site.weight, site.weight)
    mine = [node for node in forward.calls() if _reads(forward, kind, node, name)]
    if not mine:
        return None
    uses = _uses(forward, name)
    if max(len(mine), uses) > (1 if site.tied is None else 2):
        raise SiteUnfit(
            site.module,
            f"its weight takes part {max(len(mine), uses)} times in one forward pass, and the squared norm "
            "of a sum is not the sum of squared norms: its per-example norms would be wrong",
        )
    return mine[0]


def _reads(forward: ForwardGraph, kind: Kind, node: fx.Node, name: str) -> bool:
    place = kind.weight_at.get(node.target)
    return place is not None and forward.tensor_name(strip(node.args[place])) == name


def _uses(forward: ForwardGraph, name: str) -> int:
    """Count the operators that read a parameter, seen through casts."""
    pending = [n for n in forward.graph.nodes if n.op == "get_attr" and n.target == name]
    uses = 0
    while pending:
        for user in pending.pop().users:
            if user.target in CAST:
                pending.append(user)
            else:
                uses += 1
    return uses


def _enlarged_sizes(forward: ForwardGraph, rewrite: Rewrite) -> Mapping[str, int]:
    """Return the leading sizes of the layers' inputs with one more example; empty when that fails."""
    if forward.recapture_with_one_more_example is None:
        return {}
    try:
        other = forward.recapture_with_one_more_example()
        found = {}
        for site in rewrite.layers:
            node = _call(other, site)
            call = None if node is None else kinds()[site.form].find(other, site, node)
            if call is not None:
                found[site.module] = int(call.x.meta["val"].shape[0])
        return found
    except Exception as error:
        forward.notes.append(
            f"the model could not be captured with one more example ({type(error).__name__}): "
            "the first axis of the measured layers' inputs is taken for the example axis"
        )
        return {}
