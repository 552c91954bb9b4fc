"""Gradient descent with a fixed momentum."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from trainc.dsl.reading.construct import Construct, Effect, Schedule

if TYPE_CHECKING:
    import torch

    from trainc.compiler.lower.lowering import Lowering
    from trainc.runtime.step.held_updates import DecayForm


class Plain(Construct):
    """Subtracts an average of gradients times the rate."""

    cite: ClassVar = "Cauchy, C. R. Acad. Sci. Paris 25 (1847) 536"
    usage: ClassVar = "optimizer plain { rate = 0.1 }"
    targets: ClassVar = "parameters"
    default_on: ClassVar = "trainable"
    effects: ClassVar = (
        Effect("rates", "set the rate", ("clock", "rate"), ("rate",)),
        Effect("optimizer", "step", ("gradient", "rate"), ("params", "delta")),
    )
    clip: ClassVar = None
    moments: ClassVar = 1
    decay_form: ClassVar[DecayForm | None] = None

    rate: Schedule = Field(description="learning rate")

    def examine(self) -> None:
        """Nothing can be wrong."""

    def make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Build the optimizer."""
        import torch

        return torch.optim.SGD(groups, lr=0.1, momentum=0.9)

    def lower(self, to: Lowering) -> None:
        """Claim the selected parameters."""
        rates = to.schedules_of("rate")
        to.optimizer(self, {name: {"lr": rate} for name, rate in rates.items()})
