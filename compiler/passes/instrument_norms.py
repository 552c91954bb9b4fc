"""Give each fused norm a probe: zeros whose gradient is the per-example squared gradient norms."""

from __future__ import annotations

import operator
from collections.abc import Mapping

import torch
from torch import Tensor, fx

from trainc.compiler.graph.forward_graph import ForwardGraph, arguments
from trainc.compiler.graph.sizes import same_size
from trainc.compiler.method.sites import Rewrite
from trainc.compiler.passes.fuse_norms import fused_norm, locate
from trainc.compiler.passes.fuse_residual_adds import WITH_SUM
from trainc.compiler.passes.joined_views import join_views, separate_views
from trainc.compiler.passes.pass_base import NormPass
from trainc.compiler.passes.site_checks import (
    not_example_axis,
    sizes_with_one_more,
    starts_with_examples,
)


class InstrumentNorms(NormPass):
    """Adds a probe to every fused norm site; loss and parameter gradients stay as they are."""

    name = "instrument_norms"
    purpose = "measure per-example squared gradient norms at the fused norms"
    after = ("fuse_norms", "fuse_residual_adds")

    def run(self, forward: ForwardGraph, rewrite: Rewrite) -> list[str]:
        """Instrument every fused norm site."""
        served: list[str] = []
        sizes: Mapping[str, int] | None = None
        for site in rewrite.norms:
            node = fused_norm(forward, site, {*WITH_SUM, *WITH_SUM.values()})
            if node is None:
                continue
            given = arguments(node)
            x = node.args[0].meta["val"]  # type: ignore[union-attr]
            normalised = len(given["normalized_shape"])
            others = x.shape[1 : x.dim() - normalised]
            if sizes is None and any(same_size(size, forward.rows) for size in others):
                sizes = sizes_with_one_more(forward, lambda other: _input_sizes(other, rewrite))
            size_with_one_more = (sizes or {}).get(site.module)
            if x.dim() < 2 or not starts_with_examples(forward, x.shape[0], size_with_one_more):
                raise not_example_axis(forward, site.module, f"input {list(x.shape)}")
            if forward.views > 1:
                self.join_views(forward, node, x)
            # A sum is promoted; the first result of either kind of operator has its dtype.
            result = node.meta["val"][0]
            probe = forward.probe(site.module, len(site.parameters), result)
            node.update_arg(list(given).index("probe"), probe)
            served.append(site.module)
        return served

    def join_views(self, forward: ForwardGraph, node: fx.Node, x: Tensor) -> None:
        """Let the norm see the views of an example as parts of it."""
        (result,) = [n for n in node.users if n.target is operator.getitem and n.args[1] == 0]
        source = node.args[0]
        assert isinstance(source, fx.Node)
        with forward.graph.inserting_before(node):
            joined = join_views(forward, source, node)
        node.update_arg(0, joined)
        with torch.no_grad(), forward.mode:
            result.meta["val"] = (
                result.meta["val"]
                .reshape([forward.views, forward.examples, *x.shape[1:]])
                .transpose(0, 1)
            )
        with forward.graph.inserting_before(result.next):
            separated = separate_views(forward, result, x.shape[:-1], result)
        own = separated.args[0]
        result.replace_all_uses_with(separated, delete_user_cb=lambda user: user is not own)


def _input_sizes(forward: ForwardGraph, rewrite: Rewrite) -> dict[str, int]:
    calls = locate(forward, rewrite)
    return {name: int(call.x.meta["val"].shape[0]) for name, call in calls.items()}
