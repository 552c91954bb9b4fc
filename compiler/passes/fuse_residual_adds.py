"""Fuse the residual sum in front of a norm into the norm, which then writes both."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from trainc.compiler.graph.forward_graph import ForwardGraph
from trainc.compiler.graph.sizes import same_shape
from trainc.compiler.method.sites import Rewrite
from trainc.compiler.passes.fuse_norms import fused_norm
from trainc.compiler.passes.pass_base import FusingPass
from trainc.kernels.norm import add_layer_norm as _add_norm  # noqa: F401  (registers the operator)
from trainc.kernels.norm import add_rms_norm as _add_rms_norm  # noqa: F401  (registers the operator)

WITH_SUM: dict[Any, Any] = {
    torch.ops.trainc.layer_norm.default: torch.ops.trainc.add_layer_norm.default,
    torch.ops.trainc.rms_norm.default: torch.ops.trainc.add_rms_norm.default,
}


@dataclass(frozen=True)
class FuseResidualAdds(FusingPass):
    """Replaces a sum and the fused norm of it by one operator; with `always`, on any device.

    On CUDA this saves reading the sum in forward, and its gradient in backward. On a CPU the
    operator makes the two calls that it replaces, so there the graph stays as it is. Loss and
    gradients keep every bit either way. Two views of an example are joined before a measured norm, so its sum stays.
    """

    always: bool = False

    name = "fuse_residual_adds"
    purpose = "compute each residual sum and the norm of it in one operator"
    after = ("fuse_norms",)

    def run(self, forward: ForwardGraph, rewrite: Rewrite) -> list[str]:
        """Rewrite every fused norm whose input is a sum of two tensors of its shape."""
        measured, fused = {site.module for site in rewrite.norms}, []
        for site in rewrite.fused_norms:
            joined = forward.views > 1 and site.module in measured
            norm = None if joined else fused_norm(forward, site, WITH_SUM)
            if norm is not None and self.fuse(forward, norm):
                fused.append(site.module)
        if fused:
            names = ", ".join(f"`{name}`" for name in fused)
            forward.notes.append(
                f"{len(fused)} residual sums are computed by the norms that read them: {names}"
            )
        return list(self.wants(rewrite))

    def fuse(self, forward: ForwardGraph, norm: fx.Node) -> bool:
        """Put the operator where the sum is: other nodes may read the sum before the norm."""
        total = norm.args[0]
        if not isinstance(total, fx.Node) or not self._fits(total, norm):
            return False
        (result,) = norm.users
        with forward.graph.inserting_before(total):
            both = forward.call(WITH_SUM[norm.target], (*total.args, *norm.args[1:]), norm)
            summed = forward.call(operator.getitem, (both, 0), total)
            y = forward.call(operator.getitem, (both, 1), norm)
        result.replace_all_uses_with(y)
        total.replace_all_uses_with(summed)
        for node in (result, norm, total):
            forward.graph.erase_node(node)
        return True

    def _fits(self, total: fx.Node, norm: fx.Node) -> bool:
        summands = [a.meta["val"] for a in total.args if isinstance(a, fx.Node)]
        if total.target is not torch.ops.aten.add.Tensor or total.kwargs or len(summands) != 2:
            return False
        shape = total.meta["val"].shape
        alike = all(same_shape(one.shape, shape) for one in summands)
        floating = all(one.is_floating_point() for one in summands)
        wanted = self.always or total.meta["val"].device.type == "cuda"
        return wanted and floating and alike and _in_order(total, norm)


def _in_order(total: fx.Node, norm: fx.Node) -> bool:
    """Say whether the norm can be moved to its sum, and gradients still add up in the same order.

    Autograd adds the gradients of the sum's readers from the last reader to the first, and the
    operator adds the norm's gradient last. So the norm must be the first reader.
    """
    given = [a for a in norm.args[1:] if isinstance(a, fx.Node)]
    return min(total.users) is norm and all(a < total for a in given)
