"""The matrices of a weight: which of its entries map inputs to outputs together, so that they are one matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trainc.kernels.parameter.spectrum import CONV_SCALE

Layout = Literal[
    "linear", "transposed", "convolution", "transposed convolution", "stack", "transposed stack"
]
"""How a weight is stored.

`linear` is (outputs, inputs), `convolution` (outputs, inputs / groups, *kernel), `transposed convolution` (inputs,
outputs / groups, *kernel), `stack` (matrices, outputs, inputs); `transposed` alone has inputs first.
"""


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a weight: the outputs or inputs in `ranges`, all where there are none, of one matrix of a stack."""

    name: str = ""
    ranges: tuple[range, ...] = ()
    axis: Literal["outputs", "inputs"] = "outputs"
    index: int | None = None


WHOLE = Part()


@dataclass(frozen=True, slots=True)
class Division:
    """How a weight is divided into parts, and by attention head into `heads`; `reason` says why, in words.

    `groups` are those of a convolution.
    """

    layout: Layout
    reason: str
    parts: tuple[Part, ...] = (WHOLE,)
    heads: tuple[Part, ...] = ()
    groups: int = 1

    def stack(self, weight: Tensor, part: Part) -> Tensor:
        """Return a part of a weight as matrices (count, outputs, inputs), whose eigenvalues are pooled."""
        cuts = self.views(weight, part)
        return cuts[0] if len(cuts) == 1 else torch.cat(cuts, -2 if part.axis == "outputs" else -1)

    def views(self, weight: Tensor, part: Part) -> list[Tensor]:
        """Return a part of a weight as views (count, outputs, inputs) of it, one a range; of convolutions copies."""
        found = self._matrices(weight if part.index is None else weight[part.index])
        axis = -2 if part.axis == "outputs" else -1
        return [_cut(found, axis, r) for r in part.ranges] or [found]

    def _matrices(self, weight: Tensor) -> Tensor:
        if self.layout in ("linear", "transposed", "stack", "transposed stack"):
            found = weight if weight.dim() == 3 else weight[None]
            return found.mT if self.layout.startswith("transposed") else found
        # Scaled in float32 at least: 16 bits would round.
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        positions = wide.flatten(2).permute(2, 0, 1) * math.sqrt(CONV_SCALE)
        blocks: Tensor = positions.unflatten(1, (self.groups, -1)).flatten(0, 1)
        return blocks if self.layout == "convolution" else blocks.mT

    def shape(self, stored: Sequence[int], part: Part) -> tuple[int, int, int]:
        """Return the shape of `stack` for a weight of a stored shape."""
        with torch.device("meta"):
            count, outputs, inputs = self.stack(torch.empty(tuple(stored)), part).shape
        return count, outputs, inputs


def _cut(matrices: Tensor, axis: int, entries: range) -> Tensor:
    """Return some of the rows (axis -2) or columns (axis -1)."""
    where = slice(entries.start, entries.stop, entries.step)
    return matrices[:, where] if axis == -2 else matrices[..., where]
