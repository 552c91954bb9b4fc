"""GroupNorm, and InstanceNorm, which is GroupNorm with a group per channel."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, fx, nn

from trainc.compiler.errors import NotMeasurable, SiteError
from trainc.compiler.graph.forward_graph import ForwardGraph, arguments
from trainc.compiler.layers.layer import LayerKind, LayerMatch, own_names
from trainc.compiler.layers.site_state import BoundLayer, checked_probe, require_one_view
from trainc.compiler.method.sites import LayerSite
from trainc.kernels.norm.group_norm import group_norm

aten = torch.ops.aten
_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


class BoundGroupNorm(BoundLayer):
    def run_operator(self, x: Tensor) -> Tensor:
        own = cast(nn.GroupNorm, self)
        require_one_view(self.trainc)
        if self.trainc.example_index.rows > 1:
            raise SiteError(
                f"`{self.trainc.name}` cannot be measured over groups of examples. Exclude the layer from `on`"
            )
        probe = checked_probe(self.trainc, x)
        groups = getattr(own, "num_groups", x.shape[1])
        return group_norm(x, groups, own.weight, own.bias, probe, own.eps)


def recognise(name: str, module: nn.Module) -> LayerSite | None:
    """Return the site of an affine GroupNorm or InstanceNorm; raises NotMeasurable for one with running statistics."""
    own = own_names(name, module)
    if isinstance(module, _INSTANCE_NORMS):
        if module.track_running_stats:
            raise NotMeasurable(
                f"`{name}` ({type(module).__name__}) keeps running statistics, which the measuring operator does not"
                " update. Make it with track_running_stats=False, or exclude it from `on`"
            )
        known = type(module).__module__.startswith("torch.")
    else:
        known = isinstance(module, nn.GroupNorm) and type(module).forward is nn.GroupNorm.forward
    return LayerSite(name, "group_norm", own["weight"], own["bias"]) if known and own else None


def match(forward: ForwardGraph, site: LayerSite, node: fx.Node) -> LayerMatch | None:
    """Read `group_norm(x, groups, weight, bias, eps)` or `instance_norm(x, weight, bias, ...)`."""
    given = arguments(node)
    groups = given.get("num_groups", given["input"].meta["val"].shape[1])

    def insert(x: fx.Node, probe: fx.Node) -> fx.Node:
        values = (x, groups, given["weight"], given["bias"], probe, given["eps"])
        (result,) = forward.results_of(torch.ops.trainc.group_norm.default, values, node)
        return result

    return LayerMatch(given["input"], insert)


GROUP_NORM = LayerKind(
    "group_norm",
    "nn.GroupNorm and nn.InstanceNorm without running statistics",
    recognise,
    BoundGroupNorm,
    {aten.group_norm.default: 2, aten.instance_norm.default: 1},
    match,
)
