"""Huber's loss: squared near the target, and linear where the error is large."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from trainc.compiler.constructs.loss._base import ElementwiseLoss, LossConstruct

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.method.loss import Loss


class HuberLoss(ElementwiseLoss):
    """Mean of Huber's function of output - target over all entries; output and target have one shape.

    Equal to torch.nn.functional.huber_loss bit for bit.
    """

    name = "huber"

    def __init__(self, delta: float) -> None:
        self.delta = delta

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        from torch.nn.functional import huber_loss

        return huber_loss(*self.pair(outputs, targets), delta=self.delta)


class Huber(LossConstruct):
    """Trains on the mean of Huber's function of `e = output - target` over all entries of the output.

    It is `e^2 / 2` where `|e|` is at most `delta`, and `delta (|e| - delta / 2)` beyond, so that an
    outlier's gradient is never larger than `delta`. Divided by `delta` it is the smooth L1 loss.
    """

    cite: ClassVar = "Huber, Annals of Mathematical Statistics 35 (1964) 73: robust estimation"
    usage: ClassVar = "loss huber { delta = 1.0 }"

    delta: float = Field(
        default=1.0, gt=0, description="error at which the loss goes from squared to linear"
    )

    def make_loss(self) -> Loss:
        return HuberLoss(self.delta)

    def reference(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss by definition; both of one shape."""
        error = (outputs - targets).abs()
        beyond = self.delta * (error - self.delta / 2)
        each = (error * error / 2).where(error <= self.delta, beyond)
        return each.sum() / each.numel()
