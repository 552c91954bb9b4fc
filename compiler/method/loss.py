"""The protocol of a loss: a mean over counted targets, and what exact accumulation needs."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

LOSS_WEIGHT = "loss_weight"
"""The name of the 0-d tensor that carries a micro-batch's weight in the loss of its step."""


class Loss(Protocol):
    """A mean over the counted targets of `logits` and `targets`, without penalties or consistency."""

    name: str
    ignore_index: int
    label_smoothing: float

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor: ...

    def count(self, targets: Tensor) -> int:
        """Return how many targets the mean runs over."""
        ...

    def weights(self, targets: Tensor) -> Tensor:
        """Return each example's weight in the mean, shape (examples,), sum 1."""
        ...

    def metrics(self, logits: Tensor, targets: Tensor) -> dict[str, float]:
        """Return sums that an evaluation reports with the loss, such as `accuracy`: the number of right answers."""
        ...
