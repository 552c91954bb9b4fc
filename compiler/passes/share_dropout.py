"""Let the views of an example share their dropout masks, so that their distance measures the noise alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from trainc.compiler.graph.forward_graph import ForwardGraph, arguments, call_site
from trainc.compiler.graph.sizes import same_size
from trainc.compiler.method.sites import Rewrite, drawn_apart
from trainc.compiler.passes.pass_base import LOSS, Pass

aten = torch.ops.aten
_DROPOUT: dict[Any, Any] = {
    aten.dropout.default: aten.mul.Tensor,
    aten.dropout_.default: aten.mul_.Tensor,
}
# Random operators whose masks are drawn inside, so that the views cannot share them.
_UNSHARED = {
    aten.scaled_dot_product_attention.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
    aten.bernoulli.default,
    aten.bernoulli.p,
    aten.bernoulli_.float,
    aten.bernoulli_.Tensor,
    aten.rand_like.default,
    aten.randn_like.default,
}


class ShareDropout(Pass):
    """Draws one dropout mask for all views of an example."""

    name = "share_dropout"
    purpose = "draw one dropout mask for all views of an example"

    def wants(self, rewrite: Rewrite) -> tuple[str, ...]:
        """Return the loss where views with one mask are compared."""
        return (LOSS,) if rewrite.share_dropout else ()

    def run(self, forward: ForwardGraph, rewrite: Rewrite) -> list[str]:
        """Rewrite every dropout, and warn of other operators that draw random numbers for each view."""
        for node in forward.calls():
            if _draws_for_each_view(forward, node):
                where = call_site(node) or "the model"
                forward.warnings.append(drawn_apart(f"`{where}` calls {node.target}, which"))
            if node.target in _DROPOUT and node.args[2] and node.args[1] != 0.0:
                _share_mask(forward, node)
        return [LOSS]


def _draws_for_each_view(forward: ForwardGraph, node: fx.Node) -> bool:
    """Say whether an operator draws the mask of each view apart; a mask of one view has fewer rows."""
    if node.target not in _UNSHARED or arguments(node).get("dropout_p") == 0.0:
        return False
    shape = node.meta["val"].shape
    return bool(shape) and same_size(shape[0] % forward.rows, 0) and not same_size(shape[0], 0)


def _share_mask(forward: ForwardGraph, node: fx.Node) -> None:
    """Draw the mask of one dropout for the first view, and repeat it for the others."""
    x, p, _ = node.args
    assert isinstance(x, fx.Node)
    rows = x.meta["val"].shape[0]
    if same_size(rows, 0) or not same_size(rows % forward.rows, 0):
        forward.warnings.append(
            f"`{call_site(node)}` drops along another axis than that of the examples, so the views do not share its"
            " mask, and their distance measures it as well"
        )
        return
    with forward.graph.inserting_before(node):
        view = forward.call(aten.slice.Tensor, (x, 0, 0, rows // forward.views), node)
        ones = forward.call(aten.ones_like.default, (view,), node)
        mask = forward.call(aten.dropout.default, (ones, p, True), node)
        masks = forward.call(aten.cat.default, ([mask] * forward.views,), node)
        result = forward.call(_DROPOUT[node.target], (x, masks), node)
    node.replace_all_uses_with(result)
    forward.graph.erase_node(node)
