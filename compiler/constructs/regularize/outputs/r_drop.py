"""R-Drop: two passes of the same examples with dropout of their own should agree."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from trainc.compiler.constructs.regularize.outputs import _two_views
from trainc.compiler.constructs.regularize.outputs._divergence import (
    counted_rows,
    kl,
    weighted_mean,
)
from trainc.dsl.reading.construct import Construct, Problem, Schedule

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.bind.bound_clause import Targets
    from trainc.compiler.lower.lowering import Lowering


class RDrop(Construct):
    """Passes every example twice, each pass with dropout masks of its own, and adds the divergence of the two.

    With p and q the softmaxes of the two passes' logits, the loss is the mean of the losses of both
    passes plus `weight` times the mean over the counted targets of (KL(p || q) + KL(q || p)) / 2:
    both means weigh the same targets alike, and both passes have gradients. In a model without dropout
    the two passes are equal and the divergence is 0. With `weight = 0` every example passes once.
    """

    cite: ClassVar = (
        "Liang, Wu, Li et al., R-Drop: Regularized Dropout for Neural Networks, NeurIPS 2021, "
        "arXiv:2106.14448"
    )
    usage: ClassVar = "regularize r_drop { weight = 1.0 }"
    identity: ClassVar = {"weight": "0"}
    effects: ClassVar = (_two_views.two_views("pass two views with dropout of their own"),)

    weight: Schedule = Field(
        description="coefficient of the divergence; the paper has 0.1 to 1 for classifiers, 5 for translation"
    )

    def validate_targets(self, bound: Targets) -> Iterable[Problem]:
        """Warn of a model in which no layer is a Dropout."""
        yield from _two_views.no_dropout(bound)

    def lower(self, to: Lowering) -> None:
        """Pass two views, each with its own dropout, and add their divergence over the counted targets."""
        to.views(2, share_dropout=False, loss="mean")
        to.term(
            lambda forward: self.reference(
                forward.view(0), forward.view(1), forward.target_weights
            ),
            over="targets",
            weight=self.weight,
            of_classes=True,
            what="divergence of the two views",
        )

    @staticmethod
    def reference(one: Tensor, two: Tensor, weights: Tensor) -> Tensor:
        """Return (KL(p || q) + KL(q || p)) / 2 of two views' logits (..., classes), 0-d, in float32 at least.

        It is the mean by the targets' `weights` (...), bool or numbers; without one it is not a number, as the loss is.
        """
        one, two = counted_rows(weights, one, two)
        each = kl(one.log_softmax(-1), two.log_softmax(-1), "symmetric")
        return weighted_mean(each, weights)
