"""The action of `lr batch_scaling`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trainc.runtime.step.action import Action, ActionState, Phase

if TYPE_CHECKING:
    from trainc.compiler.constructs.lr.batch_scaling import BatchScaling
    from trainc.runtime.step.optimizer import LrFactor
    from trainc.runtime.step.record import Step


class ScaleWithBatch(Action):
    """Phase 2: sets the factor from the batch of the step; `reference` in samples."""

    phase = Phase.RATES

    def __init__(
        self, name: str, construct: BatchScaling, lr_factor: LrFactor, reference: float
    ) -> None:
        self.name = name
        self.construct = construct
        self.lr_factor = lr_factor
        self.reference = reference
        self.seen: list[int] = []

    def run(self, step: Step) -> None:
        size = step.batch_size
        if size < 1:
            raise ValueError(
                f"`{self.name}` needs the batch size of this step, and it is not known: call "
                "`program.step(batch)` or `program.loss(batch)` without `program.begin()` before it, or "
                "add a `data` clause to the spec"
            )
        self.lr_factor.factor = step.metrics[self.name] = self.construct.factor(
            size, self.reference
        )
        self.seen = [min([size, *self.seen]), max([size, *self.seen])]

    def state_dict(self) -> ActionState:
        return {"seen": list(self.seen)} if self.seen else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seen = [int(size) for size in state.get("seen", [])]

    def summary(self) -> str | None:
        if not self.seen:
            return None
        low, high = (self.construct.factor(size, self.reference) for size in self.seen)
        sizes = f"batches from {self.seen[0]} to {self.seen[1]} samples"
        return f"{self.name}: factors {low:.3g} to {high:.3g}, {sizes}"
