"""Movement pruning: train the weights that move away from zero, and keep the others at zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from trainc.compiler.constructs.mask._base import ZEROS_AGAIN, ChoosingMask
from trainc.dsl.reading.construct import Density, Effect
from trainc.dsl.values.value_json import Number

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.lower.lowering import Lowering
    from trainc.runtime.step.record import Step


class Movement(ChoosingMask):
    """Keeps the weights that training moves away from zero, and sets the others to zero, where they stay.

    The score of an entry is the sum over all steps of - w g, with g the gradient of the loss before masks change it;
    the largest are kept, also where they are negative. They are chosen at `from`, or after the first step where that is
    step 0, and again `every`. The score of an entry at zero stays what it was, so that it comes back where those of
    others fall below. Rows, columns and blocks are chosen by the mean of their scores. The published form keeps masked
    weights for the backward pass; here they are zero, and start from there. Otherwise it is as `mask magnitude`.
    """

    cite: ClassVar = (
        "Sanh, Wolf and Rush, Movement Pruning: Adaptive Sparsity by Fine-Tuning, NeurIPS 2020, arXiv:2005.07683,"
        " section 4"
    )
    usage: ClassVar = "mask movement on ndim(2) every 100 steps { density = cubic(from = 80%, to = 15%, over = 50%) }"
    identity: ClassVar = {"density": "100%"}
    effects: ClassVar = (
        *ZEROS_AGAIN,
        Effect(
            "reduce",
            "sum how far gradients move weights from zero",
            ("gradient", "params"),
            ("metrics",),
        ),
    )

    density: Density | None = Field(
        default=None,
        description="fraction of the entries that is kept, above 0%: a number or a schedule of the run;"
        " `n_m(n, m)` needs none, others do",
    )

    def lower(self, to: Lowering) -> None:
        """Sum scores in every step, and mask the selected parameters by them."""
        from trainc.runtime.mask.regrow import SumScores
        from trainc.runtime.mask.scores import ScoredChoice, summed_movement
        from trainc.runtime.mask.structures import mean
        from trainc.runtime.schedule.gate import Gate

        names = [entry.name for entry in to.parameters()]
        score = summed_movement()
        choice = self.choice(to, reduce=mean)
        scored = ScoredChoice(to.label, names, score.so_far, choice)

        def choose(step: Step, density: float) -> dict[str, Tensor] | None:
            return scored(step, density) if score.sums else None

        density = self.density or Number(self.exact or 1)
        to.mask(names, choose, density, choice=choice, together=self.scope != "tensor")
        sums = SumScores(to.label, score, {name: to.tensor(name) for name in names})
        sums.gate = Gate()
        to.action(sums)

    @staticmethod
    def reference(
        weights: Sequence[Mapping[str, Tensor]], gradients: Sequence[Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Return the scores after steps at these weights with these gradients, by definition."""
        found: dict[str, Tensor] = {}
        for weight, gradient in zip(weights, gradients, strict=True):
            for name in weight:
                found[name] = found.get(name, 0) - (weight[name].conj() * gradient[name]).real
        return found
