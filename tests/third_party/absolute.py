"""Mean absolute error."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from trainc.dsl.reading.construct import Construct, Effect

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.lower.lowering import Lowering


class AbsoluteError:
    """Mean of |output - target| over all entries."""

    name = "absolute"
    ignore_index = -100
    label_smoothing = 0.0

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        return (logits - targets).abs().mean()

    def count(self, targets: Tensor) -> int:
        """Return the number of entries."""
        return targets.numel()

    def weights(self, targets: Tensor) -> Tensor:
        """Return equal weights, shape (examples,)."""
        import torch

        return torch.full((len(targets),), 1 / len(targets), dtype=torch.float64)

    def metrics(self, logits: Tensor, targets: Tensor) -> dict[str, float]:
        """Return the number of entries that are nearly right."""
        return {"near": float(((logits - targets).abs() < 0.1).sum())}


class Absolute(Construct):
    """Trains on the mean absolute error."""

    cite: ClassVar = "Laplace, Memoire sur la probabilite des causes (1774)"
    usage: ClassVar = "loss absolute"
    effects: ClassVar = (Effect("forward", "compute the loss", ("forward",), ("loss",)),)

    def lower(self, to: Lowering) -> None:
        """Declare the loss."""
        to.loss(AbsoluteError())
