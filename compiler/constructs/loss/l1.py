"""Mean absolute error: a loss of regression that outliers change little."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from trainc.compiler.constructs.loss._base import ElementwiseLoss, LossConstruct

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.method.loss import Loss


class AbsoluteErrorLoss(ElementwiseLoss):
    """Mean of |output - target| over all entries; output and target have one shape.

    Equal to torch.nn.functional.l1_loss bit for bit.
    """

    name = "l1"

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        from torch.nn.functional import l1_loss

        return l1_loss(*self.pair(outputs, targets))


class AbsoluteError(LossConstruct):
    """Trains on the mean of `|output - target|` over all entries of the output."""

    cite: ClassVar = (
        "Laplace, Memoire sur la probabilite des causes (1774): least absolute deviations"
    )
    usage: ClassVar = "loss l1"

    def make_loss(self) -> Loss:
        return AbsoluteErrorLoss()

    def reference(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss by definition; both of one shape."""
        return (outputs - targets).abs().sum() / outputs.numel()
