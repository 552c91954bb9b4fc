"""Join the views of an example along a second axis, and separate them again.

Together they contribute to the example's gradient, so they must be summed before it is squared.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from trainc.compiler.graph.forward_graph import ForwardGraph

aten = torch.ops.aten


def join_views(forward: ForwardGraph, x: fx.Node, like: fx.Node) -> fx.Node:
    """Return x (views * B, ...) as (B, views, ...)."""
    shape = [forward.views, forward.examples, *x.meta["val"].shape[1:]]
    split = forward.call(aten.reshape.default, (x, shape), like)
    return forward.call(aten.transpose.int, (split, 0, 1), like)


def separate_views(
    forward: ForwardGraph, y: fx.Node, lead: Sequence[int], like: fx.Node
) -> fx.Node:
    """Return y (B, views, ..., C) as (*lead, C), where `lead` starts with views * B."""
    split = forward.call(aten.transpose.int, (y, 0, 1), like)
    return forward.call(aten.reshape.default, (split, [*lead, y.meta["val"].shape[-1]]), like)
