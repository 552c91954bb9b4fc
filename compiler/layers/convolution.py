"""Convolutions over one, two or three spatial dimensions, in groups or not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from trainc.compiler.errors import SiteError
from trainc.compiler.graph.forward_graph import ForwardGraph, arguments
from trainc.compiler.layers.layer import LayerKind, LayerMatch, own_names
from trainc.compiler.layers.site_state import (
    BoundLayer,
    checked_probe,
    join_views,
    require_one_view,
    separate_views,
)
from trainc.compiler.method.sites import LayerSite
from trainc.kernels.layer.convolution import convolution

aten = torch.ops.aten
_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CALLS = [
    getattr(getattr(aten, name), overload)
    for name in ("conv1d", "conv2d", "conv3d")
    for overload in ("default", "padding")
]


class BoundConvolution(BoundLayer):
    def run_operator(self, x: Tensor) -> Tensor:
        own, state = cast(nn.Conv2d, self), self.trainc
        require_one_view(state)
        if state.example_index.rows > 1:
            return self.over_groups(x)
        probe = checked_probe(state, x)
        padding: Any = own.padding
        if own.padding_mode != "zeros":
            x = functional.pad(x, own._reversed_padding_repeated_twice, own.padding_mode)
            padding = [0] * len(own.kernel_size)
        elif isinstance(padding, str):
            sides = own._reversed_padding_repeated_twice
            if padding == "same":
                x = functional.pad(x, sides)
            padding = [0] * len(own.kernel_size)
        return convolution(
            x, own.weight, own.bias, probe, own.stride, padding, own.dilation, own.groups
        )

    def over_groups(self, x: Tensor) -> Tensor:
        """Convolve with a group's examples along one more dimension, in which the kernel has length 1."""
        own, state = cast(nn.Conv2d, self), self.trainc
        if len(own.kernel_size) == 3 or own.padding_mode != "zeros" or isinstance(own.padding, str):
            raise SiteError(
                f"`{state.name}` cannot be measured over groups of examples. Groups need one or two spatial dimensions"
                " and zero padding given as numbers: exclude the layer from `on`"
            )
        grouped = join_views(state, x).transpose(1, 2)
        y = convolution(
            grouped,
            own.weight.unsqueeze(2),
            own.bias,
            checked_probe(state, grouped),
            (1, *own.stride),
            (0, *own.padding),
            (1, *own.dilation),
            own.groups,
        )
        return separate_views(state, y.transpose(1, 2))


def recognise(name: str, module: nn.Module) -> LayerSite | None:
    """Return the site of a plain Conv1d, Conv2d or Conv3d."""
    if not isinstance(module, _LAYERS):
        return None
    if not any(type(module).forward is layer.forward for layer in _LAYERS):
        return None
    own = own_names(name, module)
    return LayerSite(name, "convolution", own["weight"], own.get("bias"))


def _numbers(value: Any, dims: int) -> list[int]:
    given = [value] if isinstance(value, int) else list(value)
    return given * dims if len(given) == 1 else given


def _same(kernel: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """Return the zeros before and after each dimension that keep its length, last dimension first."""
    sides = []
    for size, step in zip(reversed(kernel), reversed(dilation), strict=True):
        total = step * (size - 1)
        sides += [total // 2, total - total // 2]
    return sides


def match(forward: ForwardGraph, site: LayerSite, node: fx.Node) -> LayerMatch | None:
    """Read `conv2d(x, weight, bias, stride, padding, dilation, groups)` and its siblings."""
    given = arguments(node)
    weight, bias, groups = given["weight"], given["bias"], given["groups"]
    kernel = weight.meta["val"].shape[2:]
    named = isinstance(given["padding"], str)
    stride, dilation, padding = (
        _numbers(value, len(kernel))
        for value in (given["stride"], given["dilation"], 0 if named else given["padding"])
    )
    sides = _same(kernel, dilation) if given["padding"] == "same" else []

    def insert(x: fx.Node, probe: fx.Node) -> fx.Node:
        if sides:
            x = forward.call(aten.constant_pad_nd.default, (x, sides, 0.0), node)
        values = (x, weight, bias, probe, stride, padding, dilation, groups)
        return forward.call(torch.ops.trainc.convolution.default, values, node)

    return LayerMatch(given["input"], insert)


CONVOLUTION = LayerKind(
    "convolution",
    "nn.Conv1d, nn.Conv2d and nn.Conv3d",
    recognise,
    BoundConvolution,
    dict.fromkeys(_CALLS, 1),
    match,
)
