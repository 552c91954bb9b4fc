"""Linear layers, also as the output head of a tied embedding, and transformers' Conv1D, which is one."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from trainc.compiler.errors import NotMeasurable
from trainc.compiler.graph.forward_graph import ForwardGraph, arguments, strip_casts
from trainc.compiler.layers.layer import LayerKind, LayerMatch, own_names, result_with
from trainc.compiler.layers.site_state import BoundLayer, checked_probe, join_views, separate_views
from trainc.compiler.method.sites import LayerSite
from trainc.kernels.layer.linear import linear
from trainc.kernels.layer.tied_linear import tied_linear

aten = torch.ops.aten
_FLATTENINGS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}


class BoundLinear(BoundLayer):
    def run_operator(self, x: Tensor) -> Tensor:
        own, state = cast(nn.Linear, self), self.trainc
        site = cast(LayerSite, state.measured)
        weight = own.weight.t() if site.transposed else own.weight
        joined = join_views(state, x)
        probe = checked_probe(state, joined)
        if site.tied is not None:
            rows, ids = state.partner_lookup()
            y = tied_linear(joined, weight, own.bias, probe, rows, ids)
        else:
            y = linear(joined, weight, own.bias, probe)
        return separate_views(state, y)


def recognise(name: str, module: nn.Module) -> LayerSite | None:
    """Return the site of a plain nn.Linear or of a transformers Conv1D, which keeps its weight transposed."""
    if isinstance(module, NonDynamicallyQuantizableLinear):
        raise NotMeasurable(
            f"`{name}` is the output projection of an nn.MultiheadAttention, which uses the weight directly and never"
            " calls the layer. Exclude the layer from `on`: `- type(NonDynamicallyQuantizableLinear)`"
        )
    plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    transposed = type(module).__name__ == "Conv1D" and _is_transposed(module)
    own = own_names(name, module)
    if not (plain or transposed) or not set(own) <= {"weight", "bias"}:
        return None
    return LayerSite(name, "linear", own["weight"], own.get("bias"), transposed)


def _is_transposed(module: nn.Module) -> bool:
    """Say whether a module computes `x @ weight + bias`."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not isinstance(weight, Tensor) or not isinstance(bias, Tensor) or weight.dim() != 2:
        return False
    inputs, outputs = weight.shape
    made_weight = nn.Parameter(torch.arange(inputs * outputs).sin().view(inputs, outputs))
    made_bias = nn.Parameter(torch.arange(outputs).cos())
    x = torch.arange(6 * inputs).cos().view(2, 3, inputs)
    y = result_with(module, {"weight": made_weight, "bias": made_bias}, x)
    expected = x @ made_weight + made_bias
    return (
        isinstance(y, Tensor)
        and y.shape == expected.shape
        and torch.allclose(y, expected, 1e-4, 1e-4)
    )


def match(forward: ForwardGraph, site: LayerSite, node: fx.Node) -> LayerMatch | None:
    """Read `linear(x, weight, bias)`, or `addmm(bias, view(x), weight)` of a transposed weight."""
    given = arguments(node)
    transposed = node.target is aten.addmm.default
    if transposed != site.transposed:
        return None
    if transposed:
        flat, weight, bias = strip_casts(given["mat1"]), given["mat2"], given["self"]
        x = flat.args[0] if flat.target in _FLATTENINGS else None
        if x is None or x.meta["val"].shape[-1] != flat.meta["val"].shape[-1]:
            return None
    else:
        x, weight, bias = given["input"], given["weight"], given["bias"]

    def insert(x: fx.Node, probe: fx.Node) -> fx.Node:
        turned = forward.call(aten.t.default, (weight,), node) if transposed else weight
        return forward.call(torch.ops.trainc.linear.default, (x, turned, bias, probe, "auto"), node)

    return LayerMatch(x, insert)


LINEAR = LayerKind(
    "linear",
    "nn.Linear and transformers' Conv1D",
    recognise,
    BoundLinear,
    {aten.linear.default: 1, aten.addmm.default: 2},
    match,
    joins_views=True,
)
