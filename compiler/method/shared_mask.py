"""Layers that multiply by a random mask: the views of an example share it, so that their distance leaves it out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn

from trainc.compiler.errors import ExampleAxisUnknown
from trainc.compiler.method.layer_hook import LayerContext, LayerHook

_CHANNELS = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
"""Dropout of whole channels; that of single entries has a layer and a pass of its own."""


class SharedMask(LayerHook):
    """Draws the mask of the first view alone: what the layer makes of ones. Every view is multiplied by it.

    It is of drop path, by the names that libraries give it (DropPath, StochasticDepth), and of dropout of channels.
    """

    draws = False
    of_views: ClassVar[bool] = True
    zero_is_identity = True

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Say whether a layer multiplies its input by a random mask, and drops something."""
        names = {base.__name__ for base in type(module).__mro__}
        path = any(name.endswith("DropPath") or name == "StochasticDepth" for name in names)
        return path or isinstance(module, _CHANNELS)

    def forward(
        self,
        layer: nn.Module,
        call: Callable[..., Any],
        at: LayerContext,
        /,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Return the input of every view times the mask; raises ExampleAxisUnknown where a row is no example."""
        rate = next(
            (r for n in ("drop_prob", "p") if (r := getattr(layer, n, None)) is not None), 1
        )
        if at.views == 1 or rate == 0:
            return call(*args, **kwargs)
        x, *others = args
        if at.rows is not None and x.shape[0] % at.rows:
            raise ExampleAxisUnknown(
                f"`{at.name}` gets an input of shape {tuple(x.shape)}, but the batch has {at.rows // at.views} examples"
                f" in {at.views} views, which share one mask of what is dropped. Set its rate to 0, or give it every"
                " example",
                at.clause,
            )
        half = x.shape[0] // at.views
        channels = isinstance(layer, _CHANNELS)
        ones = torch.ones_like(x[:half]) if channels else x.new_ones((half, *[1] * (x.dim() - 1)))
        return x * torch.cat([call(ones, *others, **kwargs)] * at.views)
