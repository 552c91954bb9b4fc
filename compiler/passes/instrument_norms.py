"""Give each fused norm a probe: zeros whose gradient is the per-example squared gradient norms."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from trainc.compiler.errors import SiteUnfit
from trainc.compiler.graph.forward_graph import ForwardGraph
from trainc.compiler.method.sites import NormSite, Rewrite
from trainc.compiler.passes.fuse_norms import PLACES, fused_norm, locate
from trainc.compiler.passes.pass_base import Pass

aten = torch.ops.aten


@dataclass(frozen=True)
class InstrumentNorms(Pass):
    """Adds a probe to every fused norm site; loss and parameter gradients stay as they are."""

    name: ClassVar[str] = "instrument_norms"
    purpose: ClassVar[str] = "measure per-example squared gradient norms at the fused norms"
    after: ClassVar[tuple[str, ...]] = ("fuse_norms", "fuse_residual_adds")

    def wants(self, rewrite: Rewrite) -> tuple[str, ...]:
        """Return the norm sites."""
        return tuple(site.module for site in rewrite.norms)

    def run(self, forward: ForwardGraph, rewrite: Rewrite) -> list[str]:
        """Instrument every fused norm site."""
        served: list[str] = []
        shapes: Mapping[str, torch.Size] | None = None
        for site in rewrite.norms:
            node = fused_norm(forward, site, PLACES)
            if node is None:
                continue
            place = PLACES[node.target]
            x = node.args[0].meta["val"]  # type: ignore[union-attr]
            normalised = len(node.args[place.shape])  # type: ignore[arg-type]
            if forward.rows in x.shape[1 : x.dim() - normalised]:
                shapes = _enlarged_shapes(forward, rewrite) if shapes is None else shapes
            self.check(forward, site, x, (shapes or {}).get(site.module))
            # A sum is promoted; the first result of either kind of operator has its dtype.
            wide = node.meta["val"][0].dtype == torch.float64
            dtype = torch.float64 if wide else torch.float32
            columns = len(site.parameters)
            zeros = torch.zeros(forward.examples, columns, dtype=dtype, device=x.device)
            if forward.views > 1:
                self.join_views(forward, node, x)
            node.update_arg(place.probe, forward.probe(site.module, zeros))
            served.append(site.module)
        return served

    def join_views(self, forward: ForwardGraph, node: fx.Node, x: Tensor) -> None:
        """Let the norm see an example's views as parts of it: their contributions add up before they are squared."""
        (result,) = [n for n in node.users if n.target is operator.getitem and n.args[1] == 0]
        split = [forward.views, forward.examples, *x.shape[1:]]
        with forward.graph.inserting_before(node):
            apart = forward.call(aten.reshape.default, (node.args[0], split), node)
            joined = forward.call(aten.transpose.int, (apart, 0, 1), node)
        node.update_arg(0, joined)
        with torch.no_grad(), forward.mode:
            result.meta["val"] = result.meta["val"].reshape(split).transpose(0, 1)
        with forward.graph.inserting_after(result):
            apart = forward.call(aten.transpose.int, (result, 0, 1), result)
        with forward.graph.inserting_after(apart):
            whole = forward.call(aten.reshape.default, (apart, list(x.shape)), result)
        result.replace_all_uses_with(whole, delete_user_cb=lambda user: user is not apart)

    def check(
        self,
        forward: ForwardGraph,
        site: NormSite,
        x: Tensor,
        size_with_one_more: torch.Size | None,
    ) -> None:
        """Raise unless the first axis of the norm's input is the example axis."""
        views = forward.views
        wrong = size_with_one_more is not None and size_with_one_more[0] != forward.rows + views
        if x.dim() < 2 or x.shape[0] != forward.rows or wrong:
            raise SiteUnfit(
                site.module,
                f"the first axis of its input {list(x.shape)} is not the axis of "
                f"the {forward.rows} examples, so per-example norms cannot be taken there",
            )


def _enlarged_shapes(forward: ForwardGraph, rewrite: Rewrite) -> dict[str, torch.Size]:
    """Return the norms' input shapes with one more example; empty when that fails."""
    if forward.recapture_with_one_more_example is None:
        return {}
    try:
        other = forward.recapture_with_one_more_example()
        return {name: call.x.meta["val"].shape for name, call in locate(other, rewrite).items()}
    except Exception as error:
        forward.notes.append(
            "another axis is as long as the batch, and the model could not be captured with one "
            f"more example ({type(error).__name__}): the first axis is taken for the example axis"
        )
        return {}
