"""Mean squared error: the loss of regression."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from trainc.compiler.constructs.loss._base import ElementwiseLoss, LossConstruct

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.method.loss import Loss


class MeanSquaredErrorLoss(ElementwiseLoss):
    """Mean of (output - target)^2 over all entries; output and target have one shape.

    Equal to torch.nn.functional.mse_loss bit for bit.
    """

    name = "mse"

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        from torch.nn.functional import mse_loss

        return mse_loss(*self.pair(outputs, targets))


class MeanSquaredError(LossConstruct):
    """Trains on the mean of `(output - target)^2` over all entries of the output."""

    cite: ClassVar = "Legendre, Nouvelles methodes (1805), appendix: least squares"
    usage: ClassVar = "loss mse"

    def make_loss(self) -> Loss:
        return MeanSquaredErrorLoss()

    def reference(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss by definition; both of one shape."""
        difference = outputs - targets
        return (difference * difference).sum() / difference.numel()
