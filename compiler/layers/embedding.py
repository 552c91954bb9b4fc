"""Embeddings: of tokens, of positions that all examples share, and with the weight of the output head."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, fx, nn

from trainc.compiler.graph.forward_graph import ForwardGraph, arguments
from trainc.compiler.layers.layer import LayerKind, LayerMatch, own_names
from trainc.compiler.layers.site_state import BoundLayer, checked_probe, join_views, separate_views
from trainc.compiler.method.sites import LayerSite
from trainc.kernels.layer.embedding import embedding
from trainc.kernels.layer.tied_embedding import tied_embedding

aten = torch.ops.aten


class BoundEmbedding(BoundLayer):
    def run_operator(self, x: Tensor) -> Tensor:
        own, state = cast(nn.Embedding, self), self.trainc
        site = cast(LayerSite, state.measured)
        assert state.probe is not None
        if state.shared_ids:
            x = expand_shared_ids(x, state.probe.shape[0] * state.example_index.rows * state.views)
        joined = join_views(state, x)
        probe = checked_probe(state, joined)
        if site.tied is None:
            y = embedding(joined, own.weight, own.padding_idx, probe)
        else:
            y, rows = tied_embedding(own.weight, joined, own.padding_idx, probe)
            state.lookup = rows, joined
        return separate_views(state, y)


def expand_shared_ids(ids: Tensor, rows: int) -> Tensor:
    """Return shared ids (T,) or (1, T) as a view (rows, T), a copy for every example.

    The result of the lookup is broadcast over the examples anyway; this way each example's part has a gradient.
    """
    return (ids[None] if ids.dim() == 1 else ids).expand(rows, *ids.shape[-1:])


def recognise(name: str, module: nn.Module) -> LayerSite | None:
    """Return the site of a plain nn.Embedding without renormalisation, scaling by frequency or sparse gradient."""
    if not isinstance(module, nn.Embedding) or type(module).forward is not nn.Embedding.forward:
        return None
    if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
        return None
    return LayerSite(name, "embedding", own_names(name, module)["weight"])


def match(forward: ForwardGraph, site: LayerSite, node: fx.Node) -> LayerMatch | None:
    """Read `embedding(weight, ids, padding_idx)`."""
    given = arguments(node)
    padding = None if given["padding_idx"] == -1 else given["padding_idx"]

    def insert(ids: fx.Node, probe: fx.Node) -> fx.Node:
        values = (given["weight"], ids, padding, probe)
        return forward.call(torch.ops.trainc.embedding.default, values, node)

    return LayerMatch(given["indices"], insert)


EMBEDDING = LayerKind(
    "embedding",
    "nn.Embedding",
    recognise,
    BoundEmbedding,
    {aten.embedding.default: 0},
    match,
    joins_views=True,
)
