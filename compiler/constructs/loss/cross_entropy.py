"""Cross-entropy: the loss of classifiers and language models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from trainc.compiler.constructs.loss._base import LossConstruct

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.method.loss import Loss


@dataclass(eq=False)
class CrossEntropyLoss:
    """Mean of -log softmax(logits)[target] over the targets that are not `ignore_index`.

    logits (..., classes), targets (...) int64. Equal to torch.nn.functional.cross_entropy bit for bit.
    """

    name = "cross_entropy"
    ignore_index: int
    label_smoothing: float

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        from torch.nn.functional import cross_entropy

        if logits.dim() != 2:
            logits, targets = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
        return cross_entropy(
            logits,
            targets,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
        )

    def count(self, targets: Tensor) -> int:
        """Return the number of targets that are not ignored."""
        return int((targets != self.ignore_index).sum())

    def weights(self, targets: Tensor) -> Tensor:
        """Return each example's fraction of the counted targets, shape (examples,), float64."""
        import torch

        counted = (
            (targets != self.ignore_index).reshape(targets.shape[0], -1).sum(1).to(torch.float64)
        )
        return counted / counted.sum()

    def metrics(self, logits: Tensor, targets: Tensor) -> dict[str, float]:
        """Return how many of the counted targets were predicted, as `accuracy`."""
        counted = targets != self.ignore_index
        return {"accuracy": float(((logits.argmax(-1) == targets) & counted).sum())}


class CrossEntropy(LossConstruct):
    """Trains on the mean of `-log softmax(logits)[target]` over all targets that are not ignored.

    The mean is over the targets of the whole step, however they are divided into micro-batches.
    """

    cite: ClassVar = "Good, J. R. Stat. Soc. B 14 (1952) 107: the logarithmic score"
    usage: ClassVar = "loss cross_entropy { label_smoothing = 0.1 }"

    ignore_index: int = Field(default=-100, description="target value that is left out of the loss")
    label_smoothing: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="weight of the uniform distribution mixed into the target, in [0, 1]",
    )

    def make_loss(self) -> Loss:
        return CrossEntropyLoss(self.ignore_index, self.label_smoothing)

    def reference(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss by definition; logits (..., classes), targets (...)."""
        rows = logits.reshape(-1, logits.shape[-1])
        flat = targets.reshape(-1)
        kept = flat != self.ignore_index
        log_p = rows[kept] - rows[kept].logsumexp(1, keepdim=True)
        hit = log_p.gather(1, flat[kept, None])[:, 0]
        smooth = self.label_smoothing
        return -((1 - smooth) * hit + smooth * log_p.mean(1)).mean()
