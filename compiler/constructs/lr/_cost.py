"""What measuring may cost: the fields that say how much at a time, and how often."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import Field, field_validator

from trainc.dsl.reading.construct import Construct, Fraction

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.runtime.factors.measuring import Measuring


class MeasuredAtTimes(Construct):
    """Base of policies that measure weights now and then."""

    parts: int = Field(
        default=1,
        ge=1,
        description="each measurement after the first is of one of so many parts of the weights, in turn, so that no"
        " step takes long",
    )
    budget: Fraction | None = Field(
        default=None,
        description="the largest fraction of the steps' time that measurements may take: from the second on each"
        " decides how many steps there are to the next, at least 10. Default: none",
    )
    tolerance: float | None = Field(
        default=None,
        gt=0,
        description="a weight whose change since it was measured cannot have moved alpha by more than this is not"
        " measured again. Needs memory for a copy of each measured weight. Default: all are",
    )

    @field_validator("budget", mode="after")
    @classmethod
    def _is_some(cls, value: float | None) -> float | None:
        if value is not None and not 0 < value < 1:
            raise ValueError(f"a budget is above 0% and below 100%, not {100 * value:g}%")
        return value

    def measuring(self, label: str) -> Measuring:
        """Return what decides when a clause with these fields measures, and what."""
        from trainc.runtime.factors.measuring import Measuring
        from trainc.runtime.factors.refresh import Refresh
        from trainc.runtime.factors.unmoved import Unmoved

        unmoved = None if self.tolerance is None else Unmoved()
        return Measuring(Refresh(label, self.parts, self.budget), unmoved)

    @abstractmethod
    def measure_with_room(self, matrices: Mapping[str, Tensor]) -> dict[str, tuple[float, float]]:
        """Return the figure of each part, and the Frobenius norm of a change that moves it by `tolerance` at most."""
