"""z-loss: the logarithm of the softmax's divisor stays near 0."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from trainc.compiler.constructs.regularize.outputs._divergence import counted_rows, weighted_mean
from trainc.dsl.reading.construct import Construct, Effect, Schedule

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.lower.lowering import Lowering


class ZLoss(Construct):
    """Adds `weight` times the mean over the counted targets of (log Z)^2 to the loss, with Z the softmax's divisor.

    log Z is the logsumexp of the logits of a target. A cross-entropy is the same for logits that are all shifted by one
    number; this term keeps them from drifting, which bfloat16 rounds. Where clauses pass an example several times, it
    is of the first view.
    """

    cite: ClassVar = (
        "Chowdhery et al., PaLM: Scaling Language Modeling with Pathways, JMLR 24 (2023), arXiv:2204.02311, section 5, "
        "with a weight of 1e-4"
    )
    usage: ClassVar = "regularize z_loss { weight = 1e-4 }"
    identity: ClassVar = {"weight": "0"}
    effects: ClassVar = (
        Effect("forward", "add the square of log Z", ("forward", "clock"), ("loss",)),
    )

    weight: Schedule = Field(description="coefficient of the mean square")

    def lower(self, to: Lowering) -> None:
        """Add the mean square over the counted targets."""
        to.term(
            lambda forward: self.reference(forward.view(0), forward.target_weights),
            over="targets",
            weight=self.weight,
            of_classes=True,
            what="mean square of log Z",
        )

    @staticmethod
    def reference(logits: Tensor, weights: Tensor) -> Tensor:
        """Return the mean of logsumexp(logits)^2 by the targets' `weights` (...), of logits (..., classes).

        It is 0-d, in float32 at least; without a target it is not a number, as the loss is.
        """
        (rows,) = counted_rows(weights, logits)
        each = rows.logsumexp(-1).square()
        return weighted_mean(each, weights)
