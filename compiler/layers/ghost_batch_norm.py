"""BatchNorm over groups of examples: it mixes only the examples of a group, so that groups can be compared."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from trainc.compiler.errors import NotMeasurable
from trainc.compiler.layers.layer import own_names
from trainc.compiler.layers.site_state import BoundLayer
from trainc.compiler.method.example_units import ExampleUnits, Groups
from trainc.compiler.method.layer_hook import LayerContext, LayerHook
from trainc.compiler.method.sites import LayerSite
from trainc.compiler.model.batch_statistics import calls_once
from trainc.kernels.batch_norm import ghost_batches
from trainc.kernels.batch_norm.ghost_batch_norm import ghost_batch_norm


@dataclass(frozen=True)
class GhostBatchNorm(LayerHook):
    """Normalizes each group of `size` consecutive examples by its own statistics, in train mode.

    A batch of at most `size` examples is one group. What is left over of a larger one is an error, or `remainder` and
    `running` are those of the operator. Each view of the examples is grouped by itself, and the running statistics are
    those after one batch norm per group, in order, unless `running` is "mean".
    """

    operator: ClassVar = "ghost_batch_norm"
    draws: ClassVar = False

    size: int
    remainder: Literal["error", "merge_last", "smaller", "even"] = "error"
    running: Literal["in_order", "mean"] = "in_order"

    def conflict(self, other: LayerHook) -> str:
        """Return what to write where another hook groups the layer otherwise."""
        if not isinstance(other, GhostBatchNorm):
            return super().conflict(other)
        return f"give both groups of one size, {other.size} or {self.size}, and no other rules for what is left over"

    def done_by_measuring(self, layer_type: str, units: ExampleUnits | None) -> bool:
        """Say whether the layer is measured by these groups: then that normalizes by them."""
        return layer_type == "batch_norm" and units == Groups(self.size)

    def forward(
        self,
        layer: nn.Module,
        call: Callable[..., Any],
        at: LayerContext,
        /,
        *args: Tensor,
        **kwargs: Tensor,
    ) -> Tensor:
        """Return the normalized input; by the layer itself, bit for bit, where there is one group."""
        (x,) = (*args, *kwargs.values())
        rows = x.shape[0] // at.views
        self._check(x, rows, at)
        own = cast(nn.BatchNorm2d, layer)
        plain = calls_once(layer)
        if self.running == "mean" and not plain:
            raise at.error(
                f"`{at.name}` ({type(layer).__name__}) does more than normalize, so `running = mean` cannot be done:"
                " remove it, or exclude the layer from `on`",
                "running",
            )
        if rows <= self.size and self.running == "in_order":
            parts = [call(view) for view in x.chunk(at.views)]
            return torch.cat(parts) if at.views > 1 else cast(Tensor, parts[0])
        if not plain:  # it runs once per group itself
            sizes = self._sizes(rows)
            return torch.cat(
                [call(part) for view in x.chunk(at.views) for part in view.split(sizes)]
            )
        alone = rows % self.size == 0 and self.running == "in_order"
        views = (x,) if alone else x.chunk(at.views)
        parts = [
            _of_groups(own, view, self.size, own.weight, own.bias, self.remainder, self.running)
            for view in views
        ]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _sizes(self, rows: int) -> list[int]:
        """Return the sizes of the groups of so many examples, which are more than one group."""
        size, remainder = ghost_batches.resolve(rows, self.size, self.remainder)
        count = -(-rows // size) if remainder == "smaller" else rows // size
        return [size] * (count - 1) + [rows - size * (count - 1)]

    def _check(self, x: Tensor, rows: int, at: LayerContext) -> None:
        """Raise SiteError for examples that cannot be divided, or a last group of one value a channel."""
        if rows <= self.size or rows % self.size == 0:
            return
        if self.remainder == "error":
            raise at.error(
                f"`{at.name}` gets {rows} examples, which cannot be divided into groups of {self.size}: set `micro` in"
                f" `data` to a multiple of {self.size} and let the data drop an incomplete last batch, or write"
                " `remainder = merge_last`, `smaller` or `even`"
            )
        if self._sizes(rows)[-1] * math.prod(x.shape[2:]) == 1:
            raise at.error(
                f"of the {rows} examples that `{at.name}` gets, the last group has one, which has no variance: write"
                " `remainder = merge_last`",
                "remainder",
            )


class BoundGhostBatchNorm(BoundLayer):
    """Normalizes every group by its own statistics, and measures: each group has its own weight and bias."""

    def run_operator(self, x: Tensor) -> Tensor:
        own, state = cast(nn.BatchNorm2d, self), self.trainc
        size = state.example_index.rows
        y = _of_groups(own, x, size, None, None)
        assert state.probe is not None
        gain, shift = (state.probe[:, i].repeat_interleave(size, 0) for i in (0, 1))
        shape = (x.shape[0], x.shape[1], *[1] * (x.dim() - 2))
        dtype = torch.promote_types(x.dtype, torch.float32)
        y = y.to(dtype) * (own.weight + gain).view(shape) + (own.bias + shift).view(shape)
        return y.to(x.dtype)


def _of_groups(
    own: nn.BatchNorm2d,
    x: Tensor,
    size: int,
    weight: Tensor | None,
    bias: Tensor | None,
    remainder: str = "error",
    running: str = "in_order",
) -> Tensor:
    """Return `x` normalized group by group, and count what updates the running statistics as batches of the layer."""
    mean, var = own.running_mean, own.running_var
    momentum = cast(float, own.momentum)
    rules = remainder, running
    y = ghost_batch_norm(x, mean, var, weight, bias, size, True, momentum, own.eps, *rules)
    if own.num_batches_tracked is not None:
        each, rule = ghost_batches.resolve(x.shape[0], size, remainder)
        groups = ghost_batches.count(x, each, rule)
        own.num_batches_tracked.add_(1 if running == "mean" else groups)
    return y


def check_momentum(name: str, module: nn.Module) -> None:
    """Raise ValueError for a layer that averages its statistics over all batches."""
    if getattr(module, "momentum", 0.0) is None:
        raise ValueError(
            f"`{name}` averages its statistics over all batches (momentum=None), which is not supported for groups of"
            " examples: set `momentum` of the layer to a number"
        )


def ghost_site(name: str, module: nn.Module) -> LayerSite:
    """Return the site of an affine BatchNorm.

    Raises NotMeasurable for one without weights, across replicas, or that does more than normalize.
    """
    own = own_names(name, module)
    if isinstance(module, nn.SyncBatchNorm) or not own:
        raise NotMeasurable(
            f"`{name}` ({type(module).__name__}) cannot be measured: it has no weight, or it mixes examples of several"
            " replicas. Exclude the layer from `on`"
        )
    if not calls_once(module):
        raise NotMeasurable(
            f"`{name}` ({type(module).__name__}) cannot be measured: beside BatchNorm it has a forward pass of its own,"
            " such as an activation. Exclude the layer from `on`"
        )
    return LayerSite(name, "batch_norm", own["weight"], own["bias"])
