"""Micro-batches: their place in a step, and what each leaves for the update."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(slots=True)
class MicroBatchSlice:
    """A micro-batch's place in its step: its part of the counted targets, of the examples, and where it begins."""

    share: float = 1.0
    part: float = 1.0
    first: int = 0


@dataclass(slots=True)
class Micro:
    """What a micro-batch leaves for the update: weights (units,) where it is measured, loss and its terms.

    `probes` hold the statistics by module once `backward()` has run, `whole` the squared norms of the micro-batch's
    gradient by parameter, `scale` what the loss was multiplied by before `backward()`.
    """

    weights: Tensor | None
    loss: Tensor
    terms: dict[str, Tensor]
    probes: dict[str, Tensor] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)
    scale: Tensor | None = None
    synchronised: bool = False
    training: bool = True
    """Whether the model was in train mode."""
    examples: Tensor | None = None
