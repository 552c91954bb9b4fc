"""Mean absolute error."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from trainc.compiler.method.loss import Loss
from trainc.dsl.reading.construct import Construct, Effect

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.lower.lowering import Lowering


class AbsoluteError(Loss):
    """Mean of |output - target| over all entries."""

    name = "absolute"

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).abs().mean()

    def target_weights(self, targets: Tensor) -> Tensor:
        """Return that every entry counts once."""
        import torch

        return torch.ones_like(targets)

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, tuple[float, float]]:
        """Return the number of entries that are nearly right, of all."""
        return {"near": (float(((outputs - targets).abs() < 0.1).sum()), targets.numel())}


class Absolute(Construct):
    """Trains on the mean absolute error."""

    cite: ClassVar = "Laplace, Memoire sur la probabilite des causes (1774)"
    usage: ClassVar = "loss absolute"
    effects: ClassVar = (Effect("forward", "compute the loss", ("forward",), ("loss",)),)

    def lower(self, to: Lowering) -> None:
        """Declare the loss."""
        to.loss(AbsoluteError())
