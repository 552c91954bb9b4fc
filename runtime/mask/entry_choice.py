"""Choose entries of tensors by their scores: single ones, or whole rows or columns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Granularity = Literal["element", "row", "column"]


@dataclass(frozen=True, slots=True)
class Choices:
    """What can be chosen in a tensor of `shape`: `count` elements, rows or columns of `size` entries each."""

    granularity: Granularity
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        return math.prod(self.shape) // self.size

    @property
    def size(self) -> int:
        axis = {"row": 0, "column": 1}.get(self.granularity)
        return 1 if axis is None else math.prod(self.shape) // self.shape[axis]

    def score(self, tensor: Tensor) -> Tensor:
        """Return the magnitude of each element, or the L2 norm of each row or column, shape (count,)."""
        if self.granularity == "element":
            return tensor.flatten().abs()
        across = tensor if self.granularity == "row" else tensor.transpose(0, 1)
        wide = across.flatten(1).to(torch.promote_types(tensor.dtype, torch.float32))
        return wide.abs().square().sum(1).sqrt()

    def mask(self, chosen: Tensor) -> Tensor:
        """Return where the entries of some choices are, bool of `shape`."""
        axis = int(self.granularity == "column")
        shape = (self.count,) if self.granularity == "element" else self.shape
        mask = torch.zeros(shape, dtype=torch.bool, device=chosen.device)
        return mask.index_fill_(axis, chosen, True).view(self.shape)

    def entries(self, chosen: Tensor) -> Tensor:
        """Return the sorted flat positions of the entries of some choices."""
        return (
            chosen if self.granularity == "element" else self.mask(chosen).flatten().nonzero()[:, 0]
        )


def largest(scores: Sequence[Tensor], count: int) -> list[Tensor]:
    """Return the positions of the `count` largest scores of all, for each flat tensor, sorted, int64.

    Of equal scores the earlier tensor goes first, inside a tensor the lower position, so the choice
    is a function of the numbers alone. No score is NaN, and `count` is at most their number.
    """
    # Only a tensor's own `count` largest can be among those of all.
    tops = [score.topk(min(count, score.numel()), sorted=False).values for score in scores]
    together = torch.cat([top.to(tops[0].device) for top in tops])
    threshold = together.topk(count).values[-1] if count else together.new_full((), torch.inf)
    above = [(score > threshold.to(score.device)).nonzero()[:, 0] for score in scores]
    left = count - sum(len(found) for found in above)
    chosen = []
    for score, found in zip(scores, above, strict=True):
        equal = (score == threshold.to(score.device)).nonzero()[:left, 0]
        left -= len(equal)
        chosen.append(torch.cat([found, equal]).sort().values)
    return chosen
