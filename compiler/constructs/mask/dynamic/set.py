"""SET: sparse from the start; small weights are dropped, and others grow at random."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from trainc.compiler.constructs.mask.dynamic._regrowth import Regrowing

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.runtime.mask.regrow import Growth
    from trainc.runtime.step.record import Step


class Set(Regrowing):
    """Trains a random part of the entries; drops the smallest again and again, and grows as many others at random.

    It is `mask rigl` but for what grows: entries drawn from all that do not train then, from the run's seed, the
    parameter's name and the step, so that replicas draw the same. New entries are 0, where the published ones are drawn
    anew. The published fraction is constant, `replace = 30%`.
    """

    cite: ClassVar = (
        "Mocanu et al., Scalable Training of Artificial Neural Networks with Adaptive Sparse Connectivity inspired by"
        " Network Science, Nature Communications 9 (2018) 2383, arXiv:1707.04780"
    )
    usage: ClassVar = (
        "mask set on ndim(2) - type(Embedding) every 100 steps { density = 20%, replace = 30% }"
    )

    def growth(self, seed: int) -> Growth:
        """Return random numbers."""
        from trainc.runtime.mask.scores import Random

        draw = Random(seed)

        def score(step: Step, name: str, gradient: Tensor) -> Tensor:
            return draw(step, name)

        return score
