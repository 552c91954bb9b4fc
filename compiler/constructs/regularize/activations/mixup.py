"""Mixup: training on weighted means of pairs of examples."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from trainc.compiler.constructs.regularize.activations._mixtures import Mixture
from trainc.dsl.reading.construct import Schedule

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.lower.lowering import Lowering


class Mixup(Mixture):
    """Trains on `part x_i + (1 - part) x_j`, and on the same mixture of the targets, with part ~ Beta(alpha, alpha).

    j is a random order of the micro-batch; `part` is drawn once for a step, as published, or for each
    example. The targets of `loss cross_entropy` become probabilities: a mixture's loss is then part
    times that of its first class plus (1 - part) times that of the second. Targets that are numbers
    are averaged. All passes of a step see the same mixtures; every example counts as one, as without
    it. All inputs must be floating-point numbers. Evaluation mixes nothing.
    """

    cite: ClassVar = "Zhang et al., mixup: Beyond Empirical Risk Minimization, ICLR 2018, arXiv:1710.09412, eq. 2"
    usage: ClassVar = "regularize mixup { alpha = 0.2 }"

    alpha: Schedule = Field(
        description="both parameters of the Beta distribution; 0.1 to 0.4 as published, and at 0 nothing is mixed"
    )

    def lower(self, to: Lowering) -> None:
        """Mix every micro-batch before its first pass."""
        self.lower_with(to, self.alpha, mix)

    @staticmethod
    def reference(x: Tensor, order: Tensor, part: Tensor) -> Tensor:
        """Return mixtures of the examples of (B, ...) with those at `order` (B,); `part` is (1,) or (B,)."""
        share = part.view(-1, *[1] * (x.dim() - 1)).to(x.dtype)
        return share * x + (1 - share) * x[order]


def mix(name: str, inputs: list[Tensor], order: Tensor, numbers: Tensor) -> list[Tensor]:
    """Return the part, and the mixed inputs."""
    part = numbers[:, 0]
    return [part, *(Mixup.reference(x, order, part) for x in inputs)]
