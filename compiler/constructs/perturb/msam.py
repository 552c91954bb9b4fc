"""Momentum SAM: the gradient from a point along the optimizer's own momentum, at no further pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from trainc.compiler.constructs.perturb._base import (
    UNDO,
    MovedWeights,
    WeightPerturbation,
    norm_of,
    refuse_without_momentum,
    running_means,
    sizes_of,
)
from trainc.dsl.reading.construct import Effect, Schedule
from trainc.runtime.step.around import Gradients

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.lower.lowering import Lowering
    from trainc.runtime.mask.update_mask import TrainedEntries
    from trainc.runtime.schedule.clock import Clock
    from trainc.runtime.step.record import Step


class Msam(WeightPerturbation):
    """Updates the weights w with the gradient at w - rho v / |v|, where v is the optimizer's momentum.

    v is the momentum buffer of SGD (v = momentum v + g) or the first moment of Adam, as the last
    update left it; |.| is one L2 norm over all selected parameters, also where several optimizers
    train them. There is no v before the first update, and the first step moves nothing. Clipping,
    masks and what is measured see the gradient at the moved weights, and the loss reported is that
    there. w comes back bit for bit before the update. A step has its own passes alone, so it costs
    no more than a copy of the selected weights.
    """

    cite: ClassVar = (
        "Becker, Altrock, Risse, Momentum-SAM: Sharpness Aware Minimization without Computational "
        "Overhead, 2024, arXiv:2401.12033"
    )
    usage: ClassVar = "perturb msam { rho = 0.3 }"
    identity: ClassVar = {"rho": "0"}
    effects: ClassVar = (
        Effect(
            "perturb",
            "move the weights against the momentum",
            ("params", "optimizer_state", "clock"),
            ("params",),
        ),
        UNDO,
    )

    rho: Schedule = Field(description="length of the step from the weights, 0 or more")

    def lower(self, to: Lowering) -> None:
        """Surround the passes of each step; raises ValueError for an optimizer without momentum."""
        refuse_without_momentum(to)
        to.around(Drift(to.label, to.schedule(self.rho), sizes_of(to), to.trained_entries()))

    def reference(self, momentum: Mapping[str, Tensor], rho: float) -> dict[str, Tensor]:
        """Return what is added to each weight, by definition."""
        norm = norm_of(momentum.values())
        return {name: v * (-rho / (norm + 1e-12)) for name, v in momentum.items()}


class Drift(MovedWeights):
    """Runs the passes of a step at w - rho v / |v|."""

    what: ClassVar = "the momentum"

    def __init__(
        self,
        name: str,
        rho: Callable[[Clock], float],
        sizes: Mapping[str, int],
        entries: TrainedEntries,
    ) -> None:
        super().__init__(name, rho, sizes)
        self.entries = entries

    def directions(self, step: Step, gradients: Gradients) -> Mapping[str, Tensor] | None:
        """Return the momentum; None before the first update."""
        return running_means(self.name, step, self.sizes, self.entries)

    def moves(
        self, weights: Mapping[str, Tensor], found: Mapping[str, Tensor], length: float, norm: float
    ) -> dict[str, Tensor]:
        """Return -rho v / |v|."""
        return {name: v * (-length / (norm + 1e-12)) for name, v in found.items()}
