"""The module that capture front ends trace: the user's model on every view, and the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn

from trainc.runtime.data.batch import Batch, compute_logits, repeat_views

LossFunction = Callable[[Tensor, Tensor], Tensor]
CaptureFrontEnd = Callable[["WrappedModel", Batch], fx.GraphModule]
"""Returns the flat forward graph of a wrapped model, with the user's tensors as attributes."""

PREFIX = "user"
"""The name under which a captured graph holds the user's model."""


class WrappedModel(nn.Module):
    """The model on every view of the inputs, and the loss on the first view."""

    def __init__(self, model: nn.Module, loss: LossFunction, views: int) -> None:
        super().__init__()
        self.user = model
        self.loss = loss
        self.views = views
        self.training = model.training

    def forward(self, inputs: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of the first view, and the logits of every view."""
        logits = compute_logits(self.user, repeat_views(inputs, self.views))
        first = logits if self.views == 1 else logits[: logits.shape[0] // self.views]
        return self.loss(first, targets), logits
