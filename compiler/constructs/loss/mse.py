"""Mean squared error: the loss of regression."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from trainc.compiler.constructs.loss._base import LossConstruct

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.method.loss import Loss


class MeanSquaredErrorLoss:
    """Mean of (output - target)^2 over all entries; output and target have one shape.

    Equal to torch.nn.functional.mse_loss bit for bit.
    """

    name = "mse"
    ignore_index = -100
    label_smoothing = 0.0

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        from torch.nn.functional import mse_loss

        if logits.shape != targets.shape:
            raise ValueError(
                f"the model's output has shape {tuple(logits.shape)} and the targets {tuple(targets.shape)}; `loss mse`"
                " needs equal shapes"
            )
        return mse_loss(logits, targets)

    def count(self, targets: Tensor) -> int:
        """Return the number of entries."""
        return targets.numel()

    def weights(self, targets: Tensor) -> Tensor:
        """Return equal weights, shape (examples,), float64."""
        import torch

        return torch.full((targets.shape[0],), 1.0 / targets.shape[0], dtype=torch.float64)

    def metrics(self, logits: Tensor, targets: Tensor) -> dict[str, float]:
        return {}


class MeanSquaredError(LossConstruct):
    """Trains on the mean of `(output - target)^2` over all entries of the output."""

    cite: ClassVar = "Legendre, Nouvelles methodes (1805), appendix: least squares"
    usage: ClassVar = "loss mse"

    def make_loss(self) -> Loss:
        return MeanSquaredErrorLoss()

    def reference(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss by definition; both of one shape."""
        difference = logits - targets
        return (difference * difference).sum() / difference.numel()
