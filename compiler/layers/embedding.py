"""Embeddings: of tokens, of positions that all examples share, and of words whose weight is the output head's too."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, fx, nn

from trainc.compiler.graph.forward_graph import ForwardGraph
from trainc.compiler.layers.registry import Found, Kind, own_names
from trainc.compiler.layers.site_state import Bound, checked_probe, joined_views, parted_views
from trainc.compiler.method.sites import LayerSite
from trainc.kernels.layer.embedding import embedding
from trainc.kernels.layer.tied_weights import tied_embedding

aten = torch.ops.aten


class BoundEmbedding(Bound):
    def forward(self, ids: Tensor) -> Tensor:
        if not self.reaches_operator():
            return cast(Tensor, super().forward(ids))  # type: ignore[misc]
        own, armed = cast(nn.Embedding, self), self.trainc
        site = cast(LayerSite, armed.measured)
        assert armed.probe is not None
        if armed.shared:
            ids = spread(ids, armed.probe.shape[0] * armed.division.rows * armed.views)
        joined = joined_views(armed, ids)
        probe = checked_probe(armed, joined)
        if site.tied is None:
            y = embedding(joined, own.weight, own.padding_idx, probe)
        else:
            y, rows = tied_embedding(own.weight, joined, own.padding_idx, probe)
            armed.tie = rows, joined
        return parted_views(armed, y)


def spread(ids: Tensor, rows: int) -> Tensor:
    """Give every example its own copy of ids (T,) or (1, T) that all share, as a view: (rows, T).

    The result of the lookup is broadcast over the examples anyway; now each example's part of it has a gradient.
    """
    return (ids[None] if ids.dim() == 1 else ids).expand(rows, *ids.shape[-1:])


def recognise(name: str, module: nn.Module) -> LayerSite | None:
    """Return the site of a plain nn.Embedding without renormalisation, scaling by frequency or sparse gradient."""
    if not isinstance(module, nn.Embedding) or type(module).forward is not nn.Embedding.forward:
        return None
    if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
        return None
    return LayerSite(name, "embedding", own_names(name, module)["weight"])


def find(forward: ForwardGraph, site: LayerSite, node: fx.Node) -> Found | None:
    """Read `embedding(weight, ids, padding_idx)`."""
    padding = node.args[2] if len(node.args) > 2 else -1
    padding = None if padding == -1 else padding

    def insert(ids: fx.Node, probe: fx.Node) -> fx.Node:
        return forward.call(
            torch.ops.trainc.embedding.default, (node.args[0], ids, padding, probe), node
        )

    return Found(cast(fx.Node, node.args[1]), insert)


EMBEDDING = Kind(
    "embedding", "nn.Embedding", recognise, BoundEmbedding, {aten.embedding.default: 0}, find
)
