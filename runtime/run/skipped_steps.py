"""What a run does at steps that are not sound: it stops, leaves them out and counts them, or goes on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from trainc.runtime.run.interface import (
    NonFiniteGradient,
    NonFiniteLoss,
    RunSettings,
    UnsoundStep,
)
from trainc.runtime.step.record import Step


@dataclass(slots=True)
class SkippedSteps:
    """How many steps were skipped because they were not sound, and how many in a row up to now.

    `overflowed` counts those whose gradient overflowed at the scale of a GradScaler, which finds its scale in this way.
    """

    unsound: int = 0
    in_row: int = 0
    overflowed: int = 0

    @property
    def total(self) -> int:
        """How many steps were skipped."""
        return self.unsound + self.overflowed

    def add(self, step: Step, settings: RunSettings) -> None:
        """Count a step that is not sound; raises NonFiniteLoss or NonFiniteGradient where the run ends at it."""
        if (error := self.ending(step, settings)) is not None:
            raise error
        self.unsound += 1
        self.in_row += 1

    def ending(self, step: Step, settings: RunSettings) -> UnsoundStep | None:
        """Return the error with which the run ends at a step that is not sound; None where it is to be skipped."""
        before = ""
        if settings.on_nan == "skip":
            if self.in_row < settings.skip_limit:
                return None
            before = f", and the {self.in_row} steps before it were skipped (`skip_limit`)"
        error = NonFiniteGradient if math.isfinite(step.loss) else NonFiniteLoss
        return error(
            f"{step.unsound} at step {step.clock.steps}{before}: the run stops with the weights from before this step"
        )

    def state(self) -> dict[str, float]:
        """Return the counts, for a checkpoint."""
        return {"unsound": self.unsound, "in_row": self.in_row, "overflowed": self.overflowed}

    def restore(self, state: Mapping[str, float]) -> None:
        """Set the counts that a checkpoint holds; zero where it has none."""
        self.unsound, self.in_row = int(state.get("unsound", 0)), int(state.get("in_row", 0))
        self.overflowed = int(state.get("overflowed", 0))

    def lines(self, steps: int) -> Iterator[str]:
        """Yield lines for the summary of a run; none where no step was skipped."""
        if self.unsound:
            yield (
                f"skipped {self.unsound} of {steps} steps: their loss or gradient was not finite, and they changed no"
                " weight"
            )
        if self.overflowed:
            yield (
                f"skipped {self.overflowed} of {steps} steps: a gradient overflowed at the scale of the GradScaler"
            )
